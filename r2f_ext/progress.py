"""Progress reports: the library sends them, the command line displays them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Reports what was just done."""

    def __call__(self, units: int, line: str = "", /) -> None:
        """`units` more are done (0 is allowed); `line`, if not empty, describes their result."""
        ...


def no_progress(units: int, line: str = "", /) -> None:
    """Discard a progress report."""


class Progress(Protocol):
    """Receives the progress of stages."""

    def start(self, stage: str, total: int) -> Advance:
        """Open a stage of `total` units. The caller calls the result with the number of units just done."""
        ...

    def finish(self, stage: str, completed: bool) -> None:
        """Close the stage; `completed`: it ran to its end, without an error or an interrupt."""
        ...


class Stages:
    """Runs named stages, measures their wall time, and forwards their progress.

    Attributes:
        seconds: stage -> wall time so far.
    """

    def __init__(self, progress: Progress | None = None, prefix: str = "") -> None:
        """Run no stage yet.

        Args:
            progress: None: nothing is reported.
            prefix: is displayed before each stage's name; `seconds` has the names without it.
        """
        self.progress = progress
        self.prefix = prefix
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Advance]:
        began = time.perf_counter()
        advance = no_progress if self.progress is None else self.progress.start(self.prefix + name, total)
        completed = False
        try:
            yield advance
            completed = True
        finally:
            if self.progress is not None:
                self.progress.finish(self.prefix + name, completed)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
