"""Functions of CUDA tensors, captured as CUDA graphs: what costs more to launch than to compute is launched once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls on a side stream before a capture, as PyTorch's notes on CUDA graphs advise


class Replayed:
    """A function that is captured once for each combination of shapes and dtypes, and replayed afterwards.

    On other devices the function is called as it is. It must not wait for the device, and its results depend on its
    arguments and on tensors that outlive this object alone. The results of a call are overwritten by the next call of
    the same shapes: copy what must last.

    Args:
        function: tensors -> a tensor or a tuple of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if inputs[0].device.type != "cuda":
            return self._function(*inputs)
        key = tuple((each.shape, each.dtype, each.device) for each in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        graph, own, results = self._graphs[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return results

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        own = [each.detach().clone() for each in inputs]
        side = torch.cuda.Stream(own[0].device)
        side.wait_stream(torch.cuda.current_stream(own[0].device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._function(*own)
        torch.cuda.current_stream(own[0].device).wait_stream(side)
        torch.cuda.synchronize(own[0].device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self._function(*own)
        return graph, own, results
