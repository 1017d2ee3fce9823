"""Versions, backends and hardware, for `r2f env` and for every report."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from r2f_ext import __version__
from r2f_ext.ops import backend_of, build_information
from r2f_ext.ops.schemas import SCHEMAS

PACKAGES = ("torchvision", "timm", "peft", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """Describe the installation and the machine.

    Returns:
        JSON data: versions of packages, what was built (or why it is not used), the backend of each operator on CPU
        and CUDA, the number of threads, and the name of the GPU or None.
    """
    return {
        "versions": {
            "r2f_ext": __version__,
            **{name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "build": build_information(),
        "backends": {op: {device: backend_of(op, device) for device in ("cpu", "cuda")} for op in SCHEMAS},
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
