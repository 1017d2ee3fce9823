"""What this installation is and what it runs on: for `r2f env`, and for every report."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from r2f_ext import __version__
from r2f_ext.ops import backend_of, build_information
from r2f_ext.ops.schemas import SCHEMAS

PACKAGES = {"torchvision": "torchvision", "timm": "timm", "peft": "peft", "numpy": "numpy"}


def environment() -> dict[str, Any]:
    """Versions, what was built (or why it is not used), the backend of each operator, and the hardware."""
    versions = {name: _version(package) for name, package in PACKAGES.items()}
    return {
        "versions": {
            "r2f_ext": __version__,
            **versions,
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
