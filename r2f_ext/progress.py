"""Progress that the library announces and the command line draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Somebody who wants to know how far a stage has come."""

    def start(self, stage: str, total: int) -> Advance:
        """Open a stage of `total` units; call the result with each number of units done."""
        ...

    def finish(self, stage: str) -> None:
        """Close the stage."""
        ...


class Silent:
    """Nobody."""

    def start(self, stage: str, total: int) -> Advance:
        return lambda units: None

    def finish(self, stage: str) -> None:
        pass


class Stages:
    """Runs named stages, times them and passes their progress on.

    Attributes:
        seconds: stage -> wall time so far.
    """

    def __init__(self, progress: Progress | None = None, prefix: str = "") -> None:
        """prefix: put before each stage's name where it is shown, not where it is timed."""
        self.progress = progress or Silent()
        self.prefix = prefix
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Advance]:
        began = time.perf_counter()
        advance = self.progress.start(self.prefix + name, total)
        try:
            yield advance
        finally:
            self.progress.finish(self.prefix + name)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
