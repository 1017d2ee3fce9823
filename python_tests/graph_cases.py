"""A check that several operators' tests share: what a CUDA graph replays is what a call gives."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check_replay(step: Callable[[], Sequence[Tensor]], changed: Tensor) -> None:
    """Capture a step, change one of its inputs in place, and compare the replayed results with those of a call."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        changed.mul_(-0.5)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected)
