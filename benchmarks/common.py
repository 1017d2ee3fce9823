"""Fair timing of rival functions: in one process, in turns, by the median."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]], rounds: int = 15, device: str = "cpu", calls: int = 1
) -> dict[str, float]:
    """Median milliseconds of each function, over at least 5 rounds.

    Every round times each of them once, in turn, so that noise hits all alike.
    """
    if rounds < 5:
        raise ValueError("at least 5 rounds")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for function in functions.values():  # warm caches, allocators and thread pools
        function()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def ratio_to_best_rival(medians: Mapping[str, float], ours: str = "ours") -> tuple[str, float]:
    """The fastest rival and how many times longer it takes than ours."""
    rival = min((name for name in medians if name != ours), key=medians.__getitem__)
    return rival, medians[rival] / medians[ours]


def write_json(path: str | Path, rows: list[dict[str, Any]]) -> None:
    record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
