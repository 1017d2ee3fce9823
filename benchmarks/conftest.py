"""The `versus` fixture: ours against its rivals in the same rounds, as one entry of pytest-benchmark.

What an entry of the JSON holds:

* `stats`: wall seconds of one call of ours, measured by `benchmark.pedantic`. A round draws a random order of all
  functions. Those before ours run in pedantic's `setup`, those after ours in its `teardown`, so that ours and the
  rivals are measured in the same rounds.
* `extra_info`: the line of `measure.row`: the medians of ours and of all rivals in milliseconds (per item, if a call
  makes several), the best rival, the ratio and the share of the roofline. On a GPU also the times on the device (see
  `device_time`).
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import r2f_ext
from r2f_ext.ops import build_information

sys.path.insert(0, str(Path(__file__).resolve().parent))
from device_time import device_medians
from measure import (
    LEAST_ROUNDS,
    Functions,
    best_rival,
    machine,
    orders,
    roofline_ms,
    row,
    seconds_of,
    sentence,
    synchronized,
)

SECONDS = 1.5  # target time of a row's rounds; their number is between USUAL_ROUNDS and MOST_ROUNDS
USUAL_ROUNDS, MOST_ROUNDS = 7, 61
LINES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("r2f-ext benchmarks")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the rows are measured")
    group.addoption("--rounds", type=int, help="rounds of every row, at least 5 (default: by the row's own time)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES] = []
    rounds, device = config.getoption("--rounds"), config.getoption("--device")
    if rounds is not None and rounds < LEAST_ROUNDS:
        raise pytest.UsageError(f"--rounds {rounds}: medians need at least {LEAST_ROUNDS}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU.")
    if not config.getoption("benchmark_disable") and not build_information()["loaded"]:
        # `python -m pytest` from the root imports the source folder, which has no compiled module.
        raise pytest.UsageError(f"the compiled operators are not used ({r2f_ext.__file__}): run `pytest benchmarks`.")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Record only what the figures depend on, and so no host name."""
    machine_info.clear()
    machine_info.update(machine(config.getoption("--device")))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[LINES]
    if lines:
        terminalreporter.section("ours against the best rival")
        for line in lines:
            terminalreporter.write_line(sentence(line))
        losses = sum(line["ratio"] is not None and line["ratio"] < 1 for line in lines)
        terminalreporter.write_line(f"{losses} of {len(lines)} rows are losses (ratio < 1)")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    gc.collect()  # a row's tensors do not outlive it


@dataclass(frozen=True)
class Versus:
    """See the module; `rounds`: None for as many as fit in SECONDS; `lines`: where the rows are collected."""

    benchmark: Any
    device: str
    rounds: int | None
    lines: list[dict[str, Any]]

    def __call__(
        self,
        name: str,
        shape: list[int],
        make: Callable[[], Functions],
        *,
        dtype: torch.dtype = torch.float32,
        traffic: float | None = None,
        flops: float | None = None,
        items: Mapping[str, int] | int = 1,
        tolerance: float | None = 1e-3,
        captured: bool = True,
    ) -> None:
        """Measure one row.

        Args:
            make: returns the functions, on newly made inputs; "ours" is one of them. It also prepares what does not
                change from call to call.
            traffic, flops: of one item, see `measure.roofline_ms`.
            items: how many things one call makes, for all functions or by name; recorded times are per item.
            tolerance: the largest difference between the results of the first call of each function, relative to their
                norm; None where the functions do not return the same.
            captured: whether the device times are measured too. False for functions that wait for the device.
        """
        functions = make()
        if tolerance is not None:
            require_same(functions, tolerance)
        if not self.benchmark.enabled:  # --benchmark-disable: only check that the row runs
            self.benchmark.pedantic(functions["ours"])
            for name in functions.keys() - {"ours"}:
                functions[name]()
            return
        counts = items if isinstance(items, Mapping) else dict.fromkeys(functions, items)
        medians = {each: time / counts[each] for each, time in self._wall(functions).items()}
        line = row(name, shape, dtype, medians, self.device, traffic, flops)
        if self.device == "cuda" and captured:
            line |= self._on_device(make, counts, dtype, traffic, flops)
        self.benchmark.extra_info.update(line)
        self.lines.append(line)

    def _wall(self, functions: Functions) -> dict[str, float]:
        """Median milliseconds of one call of each function; pytest-benchmark measures ours."""
        timed = {name: synchronized(function, self.device) for name, function in functions.items()}
        for function in timed.values():  # warms caches, allocators and thread pools
            function()
        fitting = int(SECONDS / sum(seconds_of(function) for function in timed.values()))
        rounds = self.rounds or max(USUAL_ROUNDS, min(MOST_ROUNDS, fitting))
        times: dict[str, list[float]] = {name: [] for name in timed if name != "ours"}
        schedule, order = orders(timed, rounds), []

        def measure(names: Iterable[str]) -> None:
            for name in names:
                times[name].append(seconds_of(timed[name]))

        def before() -> None:
            order[:] = next(schedule)
            measure(order[: order.index("ours")])

        def after() -> None:
            measure(order[order.index("ours") + 1 :])

        gc.collect()
        gc.disable()
        try:
            self.benchmark.pedantic(timed["ours"], setup=before, teardown=after, rounds=rounds)
        finally:
            gc.enable()
        medians = {"ours": self.benchmark.stats["median"]}
        medians |= {name: statistics.median(each) for name, each in times.items()}
        return {name: 1e3 * seconds for name, seconds in medians.items()}

    def _on_device(
        self,
        make: Callable[[], Functions],
        counts: Mapping[str, int],
        dtype: torch.dtype,
        traffic: float | None,
        flops: float | None,
    ) -> dict[str, Any]:
        """The device times of the row, per item, measured with CUDA graphs over rotating inputs."""
        try:
            found = device_medians(make, self.rounds or USUAL_ROUNDS)
        except RuntimeError as error:
            return {"device_error": str(error).splitlines()[0]}
        medians = {name: time / counts[name] for name, time in found.items()}
        rival, bound = best_rival(medians), roofline_ms(dtype, "cuda", traffic, flops)
        return {
            "device_ms": medians["ours"],
            "device_rivals_ms": {name: time for name, time in medians.items() if name != "ours"},
            "device_best_rival": rival,
            "device_ratio": None if rival is None else medians[rival] / medians["ours"],
            "device_roofline_fraction": None if bound is None else bound / medians["ours"],
        }


def require_same(functions: Functions, tolerance: float) -> None:
    """Assert that the result of every function equals that of the last one, up to `tolerance` times its norm."""
    results = {name: _flat(function()) for name, function in functions.items()}
    *_, expected = results.values()
    for name, found in results.items():
        difference = float((found - expected).norm() / expected.norm())
        assert difference <= tolerance, f"{name} differs by {difference:.1e}, more than {tolerance:g}"


def _flat(result: Any) -> Tensor:
    """All tensors of a result as one float64 vector."""
    if isinstance(result, Tensor):
        return result.detach().double().flatten()
    parts = result.values() if isinstance(result, Mapping) else result
    return torch.cat([_flat(part) for part in parts if part is not None])


@pytest.fixture
def versus(benchmark: Any, device: str, request: pytest.FixtureRequest) -> Versus:
    return Versus(benchmark, device, request.config.getoption("--rounds"), request.config.stash[LINES])
