"""Timing of rival functions in one process, the machine's own peaks, and what benchmark scripts share."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import r2f_ext
from r2f_ext.files import write_text
from r2f_ext.malloc import keep_freed_memory
from r2f_ext.onednn import linear
from r2f_ext.ops import build_information

RESULTS = Path(__file__).resolve().parent / "results"
LEAST_ROUNDS = 5
Functions = Mapping[str, Callable[[], object]]  # name -> what is timed; "ours" is this project's

keep_freed_memory()  # for all functions: otherwise the page faults of fresh memory are part of a time


def synchronized(function: Callable[[], object], device: str) -> Callable[[], object]:
    """The function, and on a GPU the wait until its kernels have ended."""
    if device != "cuda":
        return function

    def run() -> object:
        result = function()
        torch.cuda.synchronize()
        return result

    return run


def seconds_of(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def orders(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """A random order of the names for each round: what a function leaves in the caches affects the next one."""
    chance, order = random.Random(0), list(names)
    for _ in range(rounds):
        chance.shuffle(order)
        yield list(order)


def interleaved_medians(functions: Functions, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median wall milliseconds of each function. Every round times each function once, in a random order.

    Raises:
        ValueError: fewer than 5 rounds.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"{rounds} rounds: at least {LEAST_ROUNDS}")
    timed = {name: synchronized(function, device) for name, function in functions.items()}
    for function in timed.values():  # warms caches, allocators and thread pools
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for order in orders(timed, rounds):
        for name in order:
            times[name].append(seconds_of(timed[name]))
    return {name: 1e3 * statistics.median(each) for name, each in times.items()}


@functools.cache
def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second, read and written together, of copying 512 MiB."""
    source = torch.ones(1 << 27, device=device)
    target = torch.empty_like(source)
    milliseconds = interleaved_medians({"copy": lambda: target.copy_(source)}, 7, device)["copy"]
    return 2 * source.numel() * source.element_size() / milliseconds * 1e3


@functools.cache
def gemm_flops(dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Operations a second of a large square matrix product, by the faster of PyTorch's libraries.

    On a CPU the size starts at 256 and is doubled, up to 2048, as long as a product takes at most 0.1 s. A processor
    without bfloat16 instructions takes half a minute for a product of size 2048.
    """
    size, largest = (256, 2048) if device == "cpu" else (8192, 8192)
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        milliseconds = interleaved_medians({"product": functools.partial(linear, a, a)}, 5, device)["product"]
        if size == largest or milliseconds > 100:
            return 2 * size**3 / milliseconds * 1e3
        size *= 2


def roofline_ms(dtype: torch.dtype, device: str, traffic: float | None, flops: float | None) -> float | None:
    """A lower bound in milliseconds from the measured peaks; None if neither count is given.

    Args:
        traffic: bytes that any method must read and write.
        flops: operations that any method must do.
    """
    bounds = [] if traffic is None else [traffic / copy_bandwidth(device)]
    bounds += [] if flops is None else [flops / gemm_flops(dtype, device)]
    return 1e3 * max(bounds) if bounds else None


def best_rival(medians: Mapping[str, float]) -> str | None:
    """The fastest function that is not "ours"; None where there is no other."""
    return min((name for name in medians if name != "ours"), key=medians.__getitem__, default=None)


def row(
    name: str,
    shape: list[int],
    dtype: torch.dtype,
    medians: Mapping[str, float],
    device: str = "cpu",
    traffic: float | None = None,
    flops: float | None = None,
) -> dict[str, Any]:
    """One line of results: ours against the best rival of `medians`, which are in milliseconds.

    `ratio` is the best rival's time over ours (below 1 is a loss), `roofline_fraction` the time of `roofline_ms` over
    ours; None where there is nothing to compare with.
    """
    rival, bound = best_rival(medians), roofline_ms(dtype, device, traffic, flops)
    return {
        "name": name,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "ours_ms": medians["ours"],
        "rivals_ms": {each: time for each, time in medians.items() if each != "ours"},
        "best_rival": rival,
        "ratio": None if rival is None else medians[rival] / medians["ours"],
        "roofline_fraction": None if bound is None else bound / medians["ours"],
    }


def sentence(line: Mapping[str, Any]) -> str:
    """One line of results, for the terminal."""
    text = f"{line['name']:46} {line['shape']!s:24} {line['dtype']:>8} {line['ours_ms']:10.3f} ms"
    if line["best_rival"] is not None:
        text += f" {line['ratio']:6.2f}x over {line['best_rival']} ({line['rivals_ms'][line['best_rival']]:.3f} ms)"
    if line.get("device_ratio") is not None:
        text += f", on the device {line['device_ms']:.4f} ms, {line['device_ratio']:.2f}x"
    if line["roofline_fraction"] is not None:
        text += f", {line['roofline_fraction']:.0%} of roofline"
    return text


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine and the software that were measured, for the record beside the figures."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": build_information().get("cpu_isa"),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "r2f_ext": r2f_ext.__version__,
        "copy_GB_per_s": copy_bandwidth(device) / 1e9,
        "gemm_float32_GFLOP_per_s": gemm_flops(torch.float32, device) / 1e9,
        "gemm_bfloat16_GFLOP_per_s": gemm_flops(torch.bfloat16, device) / 1e9,
    }


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def slug(name: str) -> str:
    """A processor's name as a short file name: "Intel(R) Xeon(R) Processor @ 2.10GHz" -> "intel-xeon"."""
    plain = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", name, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", plain.lower()))


def record_path(device: str = "cpu") -> Path:
    """Where `make bench` writes: results/<version>/<processor>-ops.json.

    A CPU is named with the instruction set of its kernels: processors of one model name may differ in it.
    """
    cpu = f"{cpu_name()} {build_information().get('cpu_isa', '')}"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return RESULTS / r2f_ext.__version__ / f"{slug(name)}-ops.json"


def json_parser(description: str | None, required: bool = False) -> argparse.ArgumentParser:
    """A parser of a script that writes its results where --json says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", required=required, help="write the results")
    return parser


def device_parser(description: str | None) -> argparse.ArgumentParser:
    """The same, of a script that times something on a device."""
    parser = json_parser(description)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    return parser


def write_json(path: str | Path, results: object) -> None:
    """Write atomically, so that a script that is stopped leaves the results that it wrote last."""
    write_text(Path(path), json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Prints the path of this machine's record and makes its folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    path = record_path(parser.parse_args().device)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(path)


if __name__ == "__main__":
    main()
