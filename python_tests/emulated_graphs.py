"""CUDA graphs, emulated on a CPU: a capture records every operator with its tensors, and a replay runs them again.

As in a CUDA graph, a replay reads and writes the very tensors of the capture, and numbers of Python keep the values
that they had then. An operator whose result the host must know ends a capture.
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
WAITING = {_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.masked_select, _aten.is_nonzero, _aten._unique2}


class Waits(Exception):
    """The host would wait for a result."""


class Waited(TorchDispatchMode):
    """Counts the operators, inside this context, whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in WAITING
        return func(*args, **(kwargs or {}))


class Recorded(TorchDispatchMode):
    """The operators that ran while this was entered; `replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            raise Waits(str(func))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            if _is_view(func):
                continue
            again = tree_leaves(func(*args, **kwargs))
            if not func._schema.is_mutable:
                for old, new in zip(results, again, strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def _is_view(func: Any) -> bool:
    infos = [each.alias_info for each in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


class Captures(list[bool]):
    """Whether each function that was to be captured could be, in the order of captures."""


@contextmanager
def emulated_graphs() -> Iterator[Captures]:
    """Inside this context, functions of CPU tensors that are `Replayed` are captured."""
    captures = Captures()

    def recorded(self: cuda_graph.Replayed, own: list[Tensor]) -> tuple[cuda_graph.Graph, Any] | None:
        graph = Recorded()
        for _ in range(cuda_graph.WARM_UP):
            self._function(*own)
        try:
            with graph:
                results = self._function(*own)
        except Waits:
            captures.append(False)
            return None
        captures.append(True)
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                each.detach().fill_(0)  # a capture computes nothing
        return graph, results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph.Replayed, "captures_on", staticmethod(lambda device: True))
        patch.setattr(cuda_graph.Replayed, "_recorded", recorded)
        yield captures
