"""Fair timing of rival functions, in one process, in turns, by the median; and what the machine can do at best."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from r2f_ext.malloc import keep_freed_memory
from r2f_ext.ops import build_information

keep_freed_memory()  # for all rivals alike: what the system charges for fresh pages is nobody's merit


def options(description: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """What every benchmark script can be told: --device, --cold-l2, --json; `more`: name -> add_argument's words."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cold-l2", action="store_true", help="on a GPU, empty the L2 cache before every timing")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    for name, words in more.items():
        parser.add_argument(name, **words)
    parsed = parser.parse_args()
    if parsed.cold_l2:
        _flush_l2.wanted = True
    return parsed


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]], rounds: int = 15, device: str = "cpu", calls: int = 1
) -> dict[str, float]:
    """Median milliseconds of each function, over at least 5 rounds.

    Every round times each of them once (`calls` calls in a row), so that noise hits all alike, in an order drawn anew:
    what a function leaves in the caches helps or hinders the one after it. On a GPU by events, from an idle device.
    """
    if rounds < 5:
        raise ValueError("at least 5 rounds")
    timed = _timed_on_gpu if device == "cuda" else _timed
    for function in functions.values():  # warm caches, allocators and thread pools
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, chance = list(functions), random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            times[name].append(timed(functions[name], calls) / calls)
    return {name: statistics.median(each) for name, each in times.items()}


def _timed(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return 1e3 * (time.perf_counter() - start)


def _timed_on_gpu(function: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush_l2()
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


class _L2Flush:
    """Writes more than any L2 cache holds, where a cold cache is wanted."""

    wanted = False

    def __call__(self) -> None:
        if self.wanted:
            self._room().zero_()

    @staticmethod
    @functools.cache
    def _room() -> torch.Tensor:
        return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


_flush_l2 = _L2Flush()


def ratio_to_best_rival(medians: Mapping[str, float], ours: str = "ours") -> tuple[str, float]:
    """The fastest rival and how many times longer it takes than ours."""
    rival = min((name for name in medians if name != ours), key=medians.__getitem__)
    return rival, medians[rival] / medians[ours]


@functools.cache
def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second, read and written together, of copying half a gigabyte: what memory gives at best."""
    source = torch.ones(1 << 27, device=device)
    target = torch.empty_like(source)
    milliseconds = interleaved_medians({"copy": lambda: target.copy_(source)}, 7, device)["copy"]
    return 2 * source.numel() * source.element_size() / milliseconds * 1e3


@functools.cache
def gemm_flops(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Operations a second of a large square matrix product: what arithmetic gives at best."""
    size = 2048 if device == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / interleaved_medians({"product": lambda: a @ a}, 5, device)["product"] * 1e3


def row(
    name: str,
    shape: list[int] | list[list[int]],
    dtype: torch.dtype,
    medians: Mapping[str, float],
    device: str = "cpu",
    traffic: float | None = None,
    flops: float | None = None,
) -> dict[str, Any]:
    """One line of the results: ours against the best rival of `medians`.

    Args:
        traffic: bytes that any method must read and write; flops: operations that it must do. The roofline is the
            longer of the two times at the measured peaks; None where it says nothing.
    """
    rival, ratio = ratio_to_best_rival(medians)
    bounds = [] if traffic is None else [traffic / copy_bandwidth(device)]
    bounds += [] if flops is None else [flops / gemm_flops(dtype, device)]
    return {
        "name": name,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "ours_ms": medians["ours"],
        "baseline": rival,
        "baseline_ms": medians[rival],
        "ratio": ratio,
        "roofline_fraction": 1e3 * max(bounds) / medians["ours"] if bounds else None,
    }


def say(line: dict[str, Any]) -> None:
    """Print one line of the results."""
    bound = "" if line["roofline_fraction"] is None else f"{line['roofline_fraction']:7.0%} of roofline"
    print(
        f"{line['name']:34} {line['shape']!s:28} {line['dtype']:>8} {line['ours_ms']:9.3f} ms "
        f"{line['ratio']:6.2f}x over {line['baseline']} ({line['baseline_ms']:.3f} ms){bound}",
        flush=True,
    )


def machine(device: str = "cpu") -> dict[str, Any]:
    """What was measured on: for the record beside the figures."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": build_information().get("cpu_isa"),
        "gpu": gpu,
        "l2": ("cold" if _flush_l2.wanted else "warm") if gpu else None,
        "torch": torch.__version__,
        "copy_GB_per_s": copy_bandwidth(device) / 1e9,
        "gemm_float32_GFLOP_per_s": gemm_flops(torch.float32, device) / 1e9,
        "gemm_bfloat16_GFLOP_per_s": gemm_flops(torch.bfloat16, device) / 1e9,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_json(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """The rows of one script."""
    Path(path).write_text(json.dumps(rows, indent=1) + "\n")
