"""Calls that autograd does not record go to the kernel directly, and differ from recorded ones in nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from r2f_ext import ops
from r2f_ext.ops.graph import wants_graph


def tensors(device: torch.device | str = "cpu", requires_grad: bool = False) -> list[Tensor]:
    """x, delta and A of a layer, and their directions; as decoders: an input, two weights and two biases."""
    shapes = [(2, 3, 4), (2, 3, 5), (1, 4), (6, 2, 3, 4), (6, 2, 3, 5), (3, 4), (2, 4), (5, 2), (2,), (5,)]
    return [torch.randn(shape, device=device).requires_grad_(requires_grad) for shape in shapes]


CALLS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "lora_grad": lambda t: ops.lora_grad([t[0]], [t[1]], [t[2]], scales=[2.0]).grad_B,
    "lora_grad_tangent": lambda t: ops.lora_grad_tangent([t[0]], [t[1]], [t[3]], [t[4]], [t[2]], scales=[2.0]),
    "perceptrons": lambda t: ops.perceptrons([t[5]], t[6:8], t[8:]),
}


def test_wants_graph():
    plain, leaf = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert wants_graph([plain], [plain, leaf]) and not wants_graph([plain], []) and not wants_graph()
    with torch.no_grad():
        assert not wants_graph([leaf])


@pytest.mark.parametrize("name", CALLS)
def test_recorded_or_not_the_result_is_the_same(device, name):
    given = tensors(device)
    (result,) = CALLS[name](given)
    assert not result.requires_grad
    for t in given:
        t.requires_grad_()
    (recorded,) = CALLS[name](given)
    assert recorded.requires_grad and torch.equal(recorded, result)
    with torch.no_grad():
        assert not CALLS[name](given)[0].requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_shapes_are_inferred_without_values(name):
    expected = CALLS[name](tensors())
    with FakeTensorMode():
        assert [t.shape for t in CALLS[name](tensors())] == [t.shape for t in expected]


def test_a_result_that_was_not_recorded_can_be_differentiated_further(device):
    """Its in-place changes and its use in a graph are seen by autograd as those of any other tensor."""
    (result,) = CALLS["lora_grad"](tensors(device))
    factor = torch.ones((), device=device, requires_grad=True)
    product = result * factor
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
