"""Functions of CUDA tensors, captured as CUDA graphs: one launch for many kernels that are shorter than a launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP = 3  # calls on a side stream before a capture, as PyTorch's notes on CUDA graphs advise


class Graph(Protocol):
    """What was captured, such as a `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Run it on the tensors of the capture."""
        ...


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors that it reads its inputs from, and those that it writes its results to."""

    graph: Graph
    inputs: list[Tensor]
    results: Any


class Replayed:
    """A function that is captured once for each combination of shapes and dtypes, and replayed afterwards.

    On other devices the function is called directly. So is a function that waits for the device, which cannot be
    captured (the forward pass of some models). The function's results may depend only on its arguments and on tensors
    that outlive this object. The next call, of any shapes, overwrites the results of a call: copy what must last.

    Args:
        function: tensors -> a tensor or a tuple of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._captures: dict[tuple[object, ...], _Captured | None] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pool: Any = None

    @staticmethod
    def captures_on(device: torch.device) -> bool:
        """Whether functions of tensors on this device are captured."""
        return device.type == "cuda"

    def __call__(self, *inputs: Tensor) -> Any:
        if not self.captures_on(inputs[0].device):
            return self._function(*inputs)
        key = tuple((each.shape, each.dtype, each.device) for each in inputs)
        if key not in self._captures:
            self._captures[key] = self._capture(inputs)
        captured = self._captures[key]
        if captured is None:
            return self._function(*inputs)
        for mine, given in zip(captured.inputs, inputs, strict=True):
            mine.copy_(given)
        captured.graph.replay()
        return captured.results

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Captured | None:
        own = [each.detach().clone() for each in inputs]
        recorded = self._recorded(own)
        return None if recorded is None else _Captured(recorded[0], own, recorded[1])

    def _recorded(self, own: list[Tensor]) -> tuple[Graph, Any] | None:
        """The graph of a call and the tensors of its results; None if the function waits for the device."""
        with torch.cuda.device(own[0].device):  # a capture records the current device
            # The graphs of all shapes share their memory: of one call at a time, only the results are in use. Memory is
            # reused on the stream on which it was allocated.
            side = self._streams.setdefault(own[0].device, torch.cuda.Stream())
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP - 1):
                    self._function(*own)
                waits = self._waits(own)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            if waits:
                return None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, side):
                results = self._function(*own)
            return graph, results

    def _waits(self, inputs: list[Tensor]) -> bool:
        """Whether a call waits for the device. Tested before the capture, because a failed capture cannot be undone."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that the mode may miss some operations
            torch.cuda.set_sync_debug_mode("error")
        try:
            self._function(*inputs)
        except RuntimeError as error:
            if "called a synchronizing CUDA operation" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return False
