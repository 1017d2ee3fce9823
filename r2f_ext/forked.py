"""Work that forked processes share, at most one for each thread of the present one.

A search for a small image is a sequence of many small operations, each too short to be divided among threads: a second
thread hardly shortens the search, but a second search can use the core. Forked processes share the models and tensors
of their parent without copying them. As in torch's `DataLoader`, each computes with one thread, because threads do not
survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
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
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Result = TypeVar("Result")
Work = Callable[[Sequence[int]], Iterator[Result]]


def processes_for(items: int, each: int) -> int:
    """How many processes share this many items of work on the CPU; 1: none is forked.

    As many as the present process has threads, if their memory suffices. None is forked with fewer items than threads,
    or if memory suffices for less than half of the processes: threads that share each operation then use more cores.

    Args:
        each: bytes that a process needs beside what it shares.
    """
    threads = torch.get_num_threads()
    fitting = int(SHARE * psutil.virtual_memory().available) // max(1, each)
    return 1 if items < threads or 2 * fitting < threads or not _can_fork() else min(threads, fitting)


def shared(work: Work[Result], groups: Sequence[Sequence[int]], processes: int) -> Generator[Result, None, None]:
    """What `work` yields for the items of each group, as it comes.

    A process that is free takes the next group. With one process, or if none can be forked, all is done in the present
    one, in order. Close the iterator to end the processes early.

    Args:
        work: yields results that can be pickled; it must not write to files or streams.

    Raises:
        R2FError: a process was killed. An error of `work` is raised here as well; if it cannot be pickled, as a
            RuntimeError with its name and message.
    """
    waiting, pipes = deque(groups), list[Connection]()
    started = list[ForkProcess]()
    try:
        if processes > 1:
            _start(work, min(processes, len(groups)), pipes, started)
        while waiting and not pipes:
            yield from work(waiting.popleft())
        for pipe in pipes:
            _send(pipe, waiting.popleft())
        while pipes:
            ready = wait(pipes)
            for pipe in [each for each in pipes if each in ready]:
                yield from _received(pipe, pipes, waiting)
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()
                process.join()


def _start(work: Work[Result], count: int, pipes: list[Connection], started: list[ForkProcess]) -> None:
    """Fork processes, or as many as the system lets, and add them and the ends of their pipes to the lists."""
    context = multiprocessing.get_context("fork")
    for _ in range(count):
        own, theirs = context.Pipe()
        inherited = (*pipes, own)
        started.append(context.Process(target=_serve, args=(work, theirs, inherited, os.getpid()), daemon=True))
        try:
            with _blocked_signals():
                started[-1].start()
        except OSError:  # no memory, or too many processes
            return
        finally:
            theirs.close()
        pipes.append(own)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back, so that a process that has just been forked does not answer as its parent would."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(pipe: Connection, group: Sequence[int]) -> None:
    try:
        pipe.send(list(group))
    except OSError:
        raise R2FError(KILLED) from None


def _received(pipe: Connection, pipes: list[Connection], waiting: deque[Sequence[int]]) -> Iterator[Result]:
    """The result that a process has sent; one that has finished a group gets the next, or leaves `pipes`."""
    try:
        message = pipe.recv_bytes()
    except (EOFError, OSError):
        raise R2FError(KILLED) from None
    kind, sent, where = pickle.loads(message)
    if kind == "failed":
        raise sent from RuntimeError(f"in a forked process:\n{where}")
    if kind == "result":
        yield sent
    elif waiting:
        _send(pipe, waiting.popleft())
    else:
        pipes.remove(pipe)


def _can_fork() -> bool:
    """Whether a forked process can compute derivatives: not once autograd has threads of its own, for GPUs."""
    return sys.platform == "linux" and not torch.cuda.is_available() and not multiprocessing.current_process().daemon


def _serve(work: Work[Result], pipe: Connection, inherited: Sequence[Connection], parent: int) -> None:
    """Do the groups that the parent sends, in a forked process, until the parent closes the pipe or kills it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # A display of progress may have replaced the streams, and its lock may have been held during the fork.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for other in inherited:
        other.close()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            for message in _messages(work, pipe.recv()):
                pipe.send_bytes(message)


def _messages(work: Work[Result], group: Sequence[int]) -> Iterator[bytes]:
    """The results of a group, and then that it is done or why it failed; pickled without the reductions of
    `multiprocessing`, which pass tensors through shared memory."""
    try:
        for result in work(group):
            yield pickle.dumps(("result", result, ""))
    except Exception as error:
        yield pickle.dumps(("failed", _portable(error), traceback.format_exc()))
    else:
        yield pickle.dumps(("done", None, ""))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, where pickling does not give it back."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os._exit(1)
