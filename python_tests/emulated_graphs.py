"""CUDA graphs, emulated on a CPU: a capture records every operator with its tensors, and a replay runs them again.

As in a CUDA graph, a replay reads and writes the very tensors of the capture, and numbers of Python keep the values
that they had then. A replay spoils the results of the same function's other captures, whose memory it may use. What a
capture may not contain ends it, as far as it is an operator: results that the host must know, and tensors made of the
host's numbers. Not seen are `tolist` and `numpy`, and copies between devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2f_ext import cuda_graph

_aten = torch.ops.aten
WAITING = {
    *(_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select, _aten.is_nonzero, _aten._unique2),
    *(_aten._linalg_check_errors, _aten.lift_fresh, _aten.repeat_interleave),
}


def waits(func: Any, args: Any) -> bool:
    """Whether an operator waits for the device, or for the host's memory."""
    if func.overloadpacket in (_aten.index, _aten.index_put, _aten.index_put_):
        return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1])
    return func.overloadpacket in WAITING


class Waits(Exception):
    """A capture contains what waits."""


class Waited(TorchDispatchMode):
    """Counts the operators, inside this context, that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += waits(func, args)
        return func(*args, **(kwargs or {}))


class Recorded(TorchDispatchMode):
    """The operators that ran while this was entered; `replay` runs them again."""

    def __init__(self, owner: cuda_graph.Replayed) -> None:
        super().__init__()
        self.owner = owner
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            raise Waits(str(func))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for other in self.owner._captures.values():
            if other is not None and other.graph is not self:
                _spoil(other.results)
        for func, args, kwargs, results in self.calls:
            if _is_view(func):
                continue
            again = tree_leaves(func(*args, **kwargs))
            if not func._schema.is_mutable:
                for old, new in zip(results, again, strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def _spoil(results: Any) -> None:
    for each in tree_leaves(results):
        if isinstance(each, Tensor) and each.is_floating_point():
            each.fill_(torch.nan)


def _is_view(func: Any) -> bool:
    infos = [each.alias_info for each in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


@contextmanager
def emulated_graphs() -> Iterator[list[bool]]:
    """Inside this context, functions of CPU tensors that are `Replayed` are captured.

    Yields:
        whether each function that was to be captured could be, in the order of captures.
    """
    captures: list[bool] = []

    def recorded(self: cuda_graph.Replayed, own: list[Tensor]) -> tuple[cuda_graph.Graph, Any] | None:
        graph = Recorded(self)
        for _ in range(cuda_graph.WARM_UP):
            self._function(*own)
        try:
            with graph:
                results = self._function(*own)
        except Waits:
            captures.append(False)
            return None
        captures.append(True)
        return graph, results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph.Replayed, "captures_on", staticmethod(lambda device: True))
        patch.setattr(cuda_graph.Replayed, "_recorded", recorded)
        yield captures
