"""Times on a GPU without kernel launches and, unless inputs are small, without a warm cache: graphs over copies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from measure import Functions, orders

MOST_COPIES = 24
WARM_UP = 3  # calls on a side stream before a capture, as PyTorch's notes on CUDA graphs advise


def device_medians(make: Callable[[], Functions], rounds: int) -> dict[str, float]:
    """Median device milliseconds of one call of each function.

    `make` is called until the inputs of all copies together are larger than twice the L2 cache, but at most MOST_COPIES
    times. A function's graph calls it once for each copy, so that no call finds its inputs in the cache, unless so
    many copies still fit it. Every round replays each graph once, in a random order, between two events.

    Raises:
        RuntimeError: a function cannot be captured, for example because it waits for the device.
    """
    before = torch.cuda.memory_allocated()
    copies = [make()]
    size = max(1, torch.cuda.memory_allocated() - before)
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    copies += [make() for _ in range(min(MOST_COPIES, math.ceil(2 * cache / size) + 1) - 1)]
    graphs = {name: captured([copy[name] for copy in copies]) for name in copies[0]}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for order in orders(graphs, rounds):
        for name in order:
            times[name].append(replay_ms(graphs[name]) / len(copies))
    return {name: statistics.median(each) for name, each in times.items()}


def captured(functions: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()  # the first replay uploads the graph
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
