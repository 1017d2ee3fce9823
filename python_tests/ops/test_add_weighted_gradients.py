"""add_weighted_gradients_: the compiled operator and the reference against the einsum in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2f_ext.ops import add_weighted_gradients_, decoder_reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}
# V, P, N, d_in, d_out. By the operator's rule: no gradient is formed, none, dense, none (V N = N + V + 64), dense.
SHAPES = [(1, 7, 9, 5, 4), (3, 6, 17, 8, 11), (5, 4, 33, 3, 7), (2, 5, 66, 4, 2), (2, 5, 67, 4, 2), (90, 3, 1, 6, 2)]
FUNCTIONS = pytest.mark.parametrize(
    "function",
    [add_weighted_gradients_, decoder_reference.add_weighted_gradients_],
    ids=["operator", "reference"],
)
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def make(dtype=torch.float32, device="cpu", shapes=SHAPES) -> Lists:
    """totals, weights, x, delta"""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    totals = [torch.randn(V, d_out, d_in) for V, _, _, d_in, d_out in shapes]
    weights = [torch.randn(V, P) for V, P, _, _, _ in shapes]
    x = [torch.randn(P, N, d_in) for _, P, N, d_in, _ in shapes]
    delta = [torch.randn(P, N, d_out) for _, P, N, _, d_out in shapes]
    return tuple(
        [t.to(device, kind) for t in each]
        for each, kind in ((totals, wide), (weights, wide), (x, dtype), (delta, dtype))
    )


def expected(totals: list[Tensor], weights: list[Tensor], x: list[Tensor], delta: list[Tensor]) -> list[Tensor]:
    layers = zip(totals, weights, x, delta, strict=True)
    return [
        t.double() + torch.einsum("vp,pno,pni->voi", w.double(), d.double(), each.double()) for t, w, each, d in layers
    ]


def assert_adds_up(function, lists: Lists, dtype: torch.dtype) -> None:
    wanted = expected(*lists)
    function(*lists)
    for got, want in zip(lists[0], wanted, strict=True):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@FUNCTIONS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_the_einsum(device, dtype, function):
    assert_adds_up(function, make(dtype, device), dtype)


@pytest.mark.parametrize("shape", [(1, 40, 1, 2, 1 << 20), (5, 40, 50, 1 << 10, 1 << 10)])
def test_pairs_that_exceed_the_scratch_memory_are_taken_in_chunks(device, shape):
    assert_adds_up(add_weighted_gradients_, make(device=device, shapes=[shape]), torch.float32)


def test_any_strides_but_those_of_the_totals(device):
    totals, weights, x, delta = make(device=device)
    weights, x, delta = ([t.mT.contiguous().mT for t in each] for each in (weights, x, delta))
    weights[0] = torch.randn(1, 20, device=device)[:, 3:10]
    delta[2] = torch.eye(33, 7, device=device).expand(4, -1, -1)
    assert_adds_up(add_weighted_gradients_, (totals, weights, x, delta), torch.float32)


@FUNCTIONS
@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 5), (2, 0, 2, 4, 5), (2, 3, 0, 4, 5), (2, 3, 2, 0, 5), (2, 3, 2, 4, 0)])
def test_empty_tensors_add_nothing(device, shape, function):
    lists = make(device=device, shapes=[shape])
    before = lists[0][0].clone()
    function(*lists)
    assert torch.equal(lists[0][0], before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_operator_rules(device, dtype):
    torch.library.opcheck(torch.ops.r2f.add_weighted_gradients_.default, make(dtype, device))


@pytest.mark.parametrize(
    ("position", "tensor", "error", "words"),
    [
        (0, torch.zeros(3, 11, 9), ValueError, r"totals be \[V, d_out, d_in\]; got totals\[1\] \[3, 11, 9\]"),
        (0, torch.zeros(3, 8, 11).mT, ValueError, r"totals\[1\] must be contiguous"),
        (0, torch.zeros(3, 11, 8).double(), TypeError, r"totals\[1\] must be torch.float32"),
        (1, torch.zeros(3, 5), ValueError, r"weights \[V, P\]"),
        (2, torch.zeros(6, 16, 8), ValueError, "must share N"),
        (3, torch.zeros(6, 17, 11).double(), TypeError, r"delta\[1\] must be torch.float32"),
    ],
)
def test_errors_name_the_argument(position, tensor, error, words):
    lists = make()
    lists[position][1] = tensor
    with pytest.raises(error, match=words):
        add_weighted_gradients_(*lists)


def test_lists_of_wrong_lengths_and_other_dtypes_are_refused():
    totals, weights, x, delta = make()
    with pytest.raises(ValueError, match="same length"):
        add_weighted_gradients_(totals, weights[:-1], x, delta)
    with pytest.raises(ValueError, match="at least 1"):
        add_weighted_gradients_([], [], [], [])
    with pytest.raises(TypeError, match="float16"):
        add_weighted_gradients_(totals, weights, [t.half() for t in x], [t.half() for t in delta])


def test_nothing_is_recorded_for_autograd():
    total, w = torch.zeros(1, 4, 5), torch.ones(1, 3)
    x, delta = torch.randn(3, 2, 5, requires_grad=True), torch.randn(3, 2, 4)
    add_weighted_gradients_([total], [w], [x], [delta])
    assert not total.requires_grad
    with pytest.raises(ValueError, match="negates lazily"):
        add_weighted_gradients_([torch._neg_view(total)], [w], [x], [delta])
