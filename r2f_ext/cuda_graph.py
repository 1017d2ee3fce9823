"""Functions of CUDA tensors, captured as CUDA graphs: one launch for many kernels that are shorter than a launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls on a side stream before a capture, as PyTorch's notes on CUDA graphs advise


class Replayed:
    """A function that is captured once for each combination of shapes and dtypes, and replayed afterwards.

    On other devices the function is called directly. So is a function that waits for the device, which cannot be
    captured (the forward pass of some models). The function's results may depend only on its arguments and on tensors
    that outlive this object. The next call with the same shapes overwrites the results of a call: copy what must last.

    Args:
        function: tensors -> a tensor or a tuple of tensors.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Any] | None] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        if inputs[0].device.type != "cuda":
            return self._function(*inputs)
        key = tuple((each.shape, each.dtype, each.device) for each in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        captured = self._graphs[key]
        if captured is None:
            return self._function(*inputs)
        graph, own, results = captured
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return results

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any] | None:
        own = [each.detach().clone() for each in inputs]
        with torch.cuda.device(own[0].device):  # a capture records the current device
            return self._captured(own)

    def _captured(self, own: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any] | None:
        side = torch.cuda.Stream()
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
        with torch.cuda.graph(graph, stream=side):  # by default on a stream of the first capture's device
            results = self._function(*own)
        return graph, own, results

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
