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
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise R2FError(f"--device {options.device}: torch sees no CUDA device here; use --device cpu.")
    number = options.device.removeprefix("cuda:")
    if number.isdecimal() and int(number) >= (gpus := torch.cuda.device_count()):
        raise R2FError(f"--device {options.device}: GPUs are numbered from 0, and there are {gpus} here.")
    return distributed.device_of(options.device)


def uses_cuda(options: argparse.Namespace) -> bool:
    """Whether the command runs on a GPU."""
    return "device" in options and chosen_device(options).startswith("cuda")
