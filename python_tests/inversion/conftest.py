"""Tracing of derivatives, which takes seconds for the smallest model, once for each base and its layers in a file."""

from collections.abc import Iterator
from typing import Any

import pytest

from r2f_ext.graph_optimizer import Traced


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """Objects that differentiate the same function of the same base share their graphs."""
    kept: dict[Any, tuple[object, dict]] = {}  # with the owner, so that the base stays and its id is of no other
    begin = Traced.__init__

    def shared(self: Traced, function: Any) -> None:
        begin(self, function)
        owner = function.__self__
        key = (function.__qualname__, id(owner.target.base), owner.target.layers, getattr(owner, "training", None))
        self._graphs = kept.setdefault(key, (owner, self._graphs))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Traced, "__init__", shared)
        yield
