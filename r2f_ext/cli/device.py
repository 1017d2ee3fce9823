"""Which device a command runs on."""

from __future__ import annotations

import argparse

import torch

from r2f_ext import distributed
from r2f_ext.errors import R2FError


def chosen_device(options: argparse.Namespace) -> str:
    """The device that --device selects; with several processes, each uses its own GPU.

    Raises:
        R2FError: there is no such device.
    """
    if options.device == "auto":
        return distributed.device_of("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise R2FError("--device cuda: torch sees no CUDA device here; use --device cpu.")
    return distributed.device_of(options.device)


def uses_cuda(options: argparse.Namespace) -> bool:
    """Whether the command runs on a GPU."""
    return "device" in options and chosen_device(options).startswith("cuda")
