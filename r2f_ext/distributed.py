"""One command on several processes, as torchrun starts them. In a single process these functions do nothing.

gloo connects CPUs; with --device cuda NCCL is added, with one GPU per process. Stages divide their work by `rank()` and
`world_size()`: pairs by shards, decoders by layers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from r2f_ext.errors import R2FError

TIMEOUT = timedelta(hours=12)  # layers differ in cost, so processes wait; a process that dies is detected at once


def wanted() -> bool:
    """Whether torchrun started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def rank() -> int:
    """Index of this process; process 0 writes the common files."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _active() else 1


def device_of(kind: str) -> str:
    """The device of this process; with --device cuda each process has a GPU of its own.

    Raises:
        R2FError: there are more processes on this machine than GPUs, or one GPU is named for all of them.
    """
    if not kind.startswith("cuda") or not wanted():
        return kind
    if kind != "cuda":
        raise R2FError(f"--device {kind} is one GPU, and torchrun started several processes: use --device cuda.")
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise R2FError(
            f"more processes than GPUs here ({gpus}): start at most {gpus} with --nproc-per-node, or use --device cpu."
        )
    return f"cuda:{local}"


@contextmanager
def processes(cuda: bool) -> Iterator[None]:
    """Join the process group, if torchrun started one, and leave it at the end of the context.

    Raises:
        R2FError: another process of the run has died or cannot be reached.
    """
    if not wanted():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stopped)  # torchrun sends SIGTERM to the others when one has died
    try:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise R2FError(f"the processes of this run cannot reach one another ({error}): start it again.") from error
        yield
        dist.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)


def barrier() -> None:
    """Wait until every process has called this.

    Raises:
        R2FError: one of them has died.
    """
    gather(None)


def gather(part: Any) -> list[Any]:
    """Every process's `part` (plain data), in the order of ranks, on every process.

    Raises:
        R2FError: one of them has died.
    """
    if not _active():
        return [part]
    parts: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(parts, part)
    except RuntimeError as error:
        raise lost() from error
    return parts


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def lost() -> R2FError:
    """The error for a process that does not answer any more."""
    return R2FError(
        "another process of this run has died: run the same command again, and it goes on from what is finished."
    )


def _stopped(number: int, frame: FrameType | None) -> NoReturn:
    raise lost()
