"""Work that forked processes share, one for each core.

A small image keeps one core busy with many small operations, each too short to be shared between threads: a second
thread hardly shortens a search, but a second search beside it costs no time. Forked processes share the models and
tensors of their parent without copying them. As in torch's `DataLoader`, each computes with one thread, because threads
do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import psutil
import torch

from r2f_ext.errors import R2FError

SHARE = 0.7  # of the memory that is free, for all processes together
LOOK_EVERY = 1.0  # seconds between a process's looks at whether its parent is alive
KILLED = (
    "a process that shared the work was killed, perhaps for lack of memory: use a machine with more, or set "
    "OMP_NUM_THREADS=1, with which no processes are forked."
)

Result = TypeVar("Result")
Work = Callable[[Sequence[int]], Iterator[Result]]


def processes_for(items: int, each: int) -> int:
    """How many processes share this many items of work on the CPU; 1: none is forked.

    As many as the present process has threads, if their memory suffices. With fewer items than threads none is forked,
    so that all threads share the operations of each item.

    Args:
        each: bytes that a process needs beside what it shares.
    """
    threads = torch.get_num_threads()
    if items < threads or not _can_fork():
        return 1
    return max(1, min(threads, int(SHARE * psutil.virtual_memory().available) // max(1, each)))


def shared(work: Work[Result], groups: Sequence[Sequence[int]], processes: int) -> Generator[Result, None, None]:
    """What `work` yields for the items of each group, as it comes.

    A process that is free takes the next group. With one process, all is done in the present one, in order. Close the
    iterator to end the processes early.

    Args:
        work: yields results that can be pickled; it must not write to files or streams.

    Raises:
        R2FError: a process was killed. An error of `work` is raised here as well.
    """
    if processes <= 1:
        for group in groups:
            yield from work(group)
        return
    waiting, context = deque(groups), multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    started = []
    try:
        for _ in range(min(processes, len(groups))):
            own, theirs = context.Pipe()
            pipes.append(own)
            started.append(context.Process(target=_serve, args=(work, theirs, tuple(pipes), os.getpid()), daemon=True))
            started[-1].start()
            theirs.close()
            own.send(waiting.popleft())
        while pipes:
            for pipe in wait(pipes):
                assert isinstance(pipe, Connection)
                yield from _received(pipe, pipes, waiting)
    finally:
        for process in started:
            process.kill()
            process.join()


def _received(pipe: Connection, pipes: list[Connection], waiting: deque[Sequence[int]]) -> Iterator[Result]:
    """The result that a process has sent; one that has finished a group gets the next, or leaves `pipes`."""
    try:
        kind, sent = pickle.loads(pipe.recv_bytes())
    except EOFError:
        raise R2FError(KILLED) from None
    if kind == "failed":
        raise sent
    if kind == "result":
        yield sent
    elif waiting:
        pipe.send(waiting.popleft())
    else:
        pipes.remove(pipe)


def _can_fork() -> bool:
    """Whether a forked process can compute derivatives: not once autograd has threads of its own, for GPUs."""
    return sys.platform == "linux" and not torch.cuda.is_available() and not multiprocessing.current_process().daemon


def _serve(work: Work[Result], pipe: Connection, inherited: Sequence[Connection], parent: int) -> None:
    """The life of a forked process: the groups that it is sent, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError):  # there is no work left, or the parent has ended
        while True:
            group = pipe.recv()
            try:
                for result in work(group):
                    pipe.send_bytes(_pickled("result", result))
            except BrokenPipeError:
                raise
            except Exception as error:
                pipe.send_bytes(_pickled("failed", error))
            else:
                pipe.send_bytes(_pickled("done", None))


def _pickled(kind: str, sent: object) -> bytes:
    """Without the reductions of `multiprocessing`, which pass tensors through shared memory."""
    return pickle.dumps((kind, sent))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os._exit(1)
