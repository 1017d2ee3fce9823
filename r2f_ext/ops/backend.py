"""Loads the compiled kernels if they fit the running PyTorch, and reports which kernel an operator uses."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from .schemas import NAMESPACE, SCHEMAS

# Written by setup.py beside the compiled module.
BUILD_RECORD = Path(__file__).resolve().parent.parent / "_build_info.json"

_build: dict[str, Any] = {}
_why_not_loaded: str | None = "r2f_ext.ops has not been imported"


def load_compiled_kernels() -> None:
    """Load `r2f_ext._C`, which registers its kernels, if it was built for the PyTorch that is running.

    Otherwise every operator keeps its reference implementation, and the reason is recorded for `build_information`.
    Called once, when `r2f_ext.ops` is imported, so a user sees the warning once in a process.

    Warns:
        RuntimeWarning: the module was built for another PyTorch or CUDA (both versions are named), or cannot be loaded.
    """
    global _build, _why_not_loaded
    _build = _read_record()
    _why_not_loaded = _reason_to_stay_with_reference()
    if _why_not_loaded is None:
        try:
            compiled = importlib.import_module("r2f_ext._C")
            _build = {**_build, **compiled.build_info()}
            return
        except ImportError as error:
            _why_not_loaded = f"the compiled module could not be loaded: {error}"
    if _chosen_reference() is None:
        warnings.warn(f"r2f_ext runs on plain PyTorch operators: {_why_not_loaded}", RuntimeWarning, stacklevel=2)


def _read_record() -> dict[str, Any]:
    try:
        return dict(json.loads(BUILD_RECORD.read_text()))
    except (OSError, ValueError):
        return {}


def _reason_to_stay_with_reference() -> str | None:
    return _chosen_reference() or _mismatch()


def _chosen_reference() -> str | None:
    """Why the user wants plain PyTorch operators; None if compiled kernels are expected."""
    if os.environ.get("R2F_FORCE_REFERENCE", "0") not in ("", "0"):
        return "R2F_FORCE_REFERENCE is set"
    if not _build:
        return "this installation has no compiled kernels (built with R2F_BUILD=none, or not built)"
    return None


def _mismatch() -> str | None:
    """Why the compiled module does not fit; None if it does.

    A C++ extension fits only the PyTorch that it was compiled against: with another it may fail to load, or misbehave.
    """
    if _build.get("torch") != torch.__version__:
        return f"compiled for torch {_build.get('torch')}, but torch {torch.__version__} is running: reinstall r2f-ext"
    running = cuda_major(torch.version.cuda)
    built = _build.get("cuda_major")
    if built is not None and running is not None and built != running:
        return f"compiled with CUDA {built}, but torch runs with CUDA {running}: reinstall r2f-ext"
    return None


def cuda_major(version: str | None) -> int | None:
    return int(version.split(".")[0]) if version else None


def build_information() -> dict[str, Any]:
    """What was built (empty if nothing was), with `loaded` and, if not loaded, `why_not_loaded`."""
    information: dict[str, Any] = {**_build, "loaded": _why_not_loaded is None}
    if _why_not_loaded is not None:
        information["why_not_loaded"] = _why_not_loaded
    return information


def backend_of(op_name: str, device_type: str) -> str:
    """The kernel that `torch.ops.r2f.<op_name>` runs for tensors on `device_type`: "cuda", "cpu" or "reference"."""
    if op_name not in SCHEMAS:
        raise KeyError(f"no operator named {op_name!r}; there are: {', '.join(SCHEMAS)}")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return "reference"
    own_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op_name}", key)
    return device_type if own_kernel else "reference"
