"""How a command ends when it does not succeed: one sentence on stderr and an exit code."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from r2f_ext.errors import R2FError, out_of_memory, plain

REFUSED, INCOMPLETE, UNEXPECTED = 2, 3, 70  # 70: sysexits.h
INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number
TRACEBACK = "traceback.txt"
RESUMED = ("pairs", "fit", "study")  # the commands that go on from what an interrupted run finished
# Errors of the machine, not of this program -> the remedy.
SYSTEM_ERRORS = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EACCES: "change its permissions or name another one",
    errno.EPERM: "change its permissions or name another one",
    errno.EROFS: "choose another disk",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a KeyboardInterrupt so that the same clean-up code runs."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM inside the context; only the main thread can receive signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
    raise Terminated


def escape_what_the_terminal_cannot_show() -> None:
    """Let stdout and stderr escape characters that they cannot encode (a path under PYTHONIOENCODING=ascii)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def report_failure(error: BaseException, options: argparse.Namespace) -> int:
    """Print what went wrong, the traceback too with --debug; returns the exit code."""
    if options.debug:
        traceback.print_exception(error)
    sentence, code = _explain(error, options)
    notes = [plain(note, 400) for note in getattr(error, "__notes__", ())]  # `replacing_report` adds one
    print(f"r2f {options.command}: {' '.join([sentence, *notes])}", file=sys.stderr)
    return code


def _explain(error: BaseException, options: argparse.Namespace) -> tuple[str, int]:
    if isinstance(error, R2FError):
        return str(error), REFUSED
    if isinstance(error, Terminated):
        return f"terminated; {_left_behind(options)}", TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {_left_behind(options)}", INTERRUPTED
    if out_of_memory(error):
        on_gpu = "CUDA" in str(error) or "CUBLAS" in str(error)
        remedies = ["run with --device cpu"] if on_gpu else []
        remedies += ["ask for fewer pairs (--count)"] if hasattr(options, "count") else []
        place = " on the GPU" if on_gpu else ""
        return f"out of memory{place}: {', or '.join([*remedies, 'use a machine with more memory'])}.", REFUSED
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        place = "" if error.filename is None else f" ('{error.filename}')"
        return f"{error.strerror}{place}: {SYSTEM_ERRORS[error.errno]}.", REFUSED
    first_line = (str(error).splitlines() or [""])[0][:200].rstrip(".")
    what = f"unexpected {type(error).__name__}{': ' * bool(first_line)}{first_line}"
    return f"{what}; the traceback is in {_write_traceback(error, options)} (--debug shows it here).", UNEXPECTED


def _left_behind(options: argparse.Namespace) -> str:
    if options.command in RESUMED:
        return "nothing half-written was left behind, and the same command goes on from what is finished."
    if getattr(options, "gauss_newton", False):
        return "nothing half-written was left behind, and the same command goes on after the last search that ended."
    return "nothing half-written was left behind."


def _write_traceback(error: BaseException, options: argparse.Namespace) -> Path:
    """Write the traceback under --out, or to a temporary file if --out is missing or not writable."""
    text = "".join(traceback.format_exception(error))
    if getattr(options, "out", None) is not None:
        path = Path(options.out) / TRACEBACK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return path
        except OSError:
            pass
    with tempfile.NamedTemporaryFile("wb", prefix="r2f-", suffix=f"-{TRACEBACK}", delete=False) as file:
        file.write(text.encode(errors="backslashreplace"))
    return Path(file.name)
