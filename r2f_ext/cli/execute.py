"""Runs a parsed command; all modules that need torch are imported from here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from r2f_ext import distributed
from r2f_ext.cli import commands, display
from r2f_ext.cli.device import chosen_device, uses_cuda
from r2f_ext.cli.failures import INCOMPLETE
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder, write_text
from r2f_ext.gpu import float32_products
from r2f_ext.malloc import keep_freed_memory


def execute(options: argparse.Namespace) -> int:
    """Run the command, on one process or as one of several, and write --json; returns the exit code.

    Raises:
        R2FError: any error that the user can correct.
    """
    keep_freed_memory()
    if options.json is not None:
        output_folder(Path(options.json).resolve().parent)
    if distributed.wanted() and options.command not in commands.DISTRIBUTED:
        raise R2FError(f"only {' and '.join(commands.DISTRIBUTED)} run on several processes: leave torchrun out.")
    if uses_cuda(options) and ":" in (device := chosen_device(options)):
        torch.cuda.set_device(device)  # for tensors made on "cuda" without a number, and for the GPU's name in reports
    with distributed.processes(cuda=uses_cuda(options)), float32_products():
        first = distributed.rank() == 0
        display.console.quiet = not first
        printed = commands.load(options.command)(options)
        if options.json is not None and first:
            write_text(Path(options.json), json.dumps(printed, indent=1))
    if not printed.get("incomplete"):
        return 0
    print(f"r2f {options.command}: {printed['incomplete']}", file=sys.stderr)
    return INCOMPLETE
