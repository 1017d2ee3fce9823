"""One small case of each hand-written kernel, dtype and edge: what `benchmarks/gpu.sh` runs under compute-sanitizer.

Expected values come from the references on the CPU, so that on a GPU almost only the project's own kernels run.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2f_ext.ops import (
    factored_matching_loss,
    lora_grad,
    lora_grad_tangent,
    matching_loss,
    reference,
    signed_adam_step_,
)
from r2f_ext.ops.matching_loss import KINDS

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CHUNK = 16384  # elements of a block's sums in matching_loss
# P, N, d_in, d_out: on both sides of the tiles of tokens, stripes of columns and steps of features
LAYERS = [(3, 17, 136, 72), (2, 65, 24, 136), (1, 1, 8, 8), (2, 150, 656, 64)]
MANY_ITEMS = {"accumulate": (700, 2, 8, 384), "project": (2100, 1, 8, 8)}  # one warp for each item


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def on(device: torch.device, *lists: list[Tensor]) -> list[list[Tensor]]:
    return [[t.to(device) for t in each] for each in lists]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for one, other in zip(found, expected, strict=True):
        one, other = one.cpu().double(), other.double()
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm().clamp_min(0.1)


@pytest.mark.parametrize("per_group", [False, True], ids=["one A", "A per group"])
@pytest.mark.parametrize(
    ("dtype", "rank"),
    [(torch.float32, r) for r in (3, 4, 8, 16)] + [(torch.bfloat16, r) for r in (5, 16, 29)],
    ids=str,
)
def test_lora_grad(device, dtype, rank, per_group):
    shapes = LAYERS if dtype == torch.bfloat16 else [(P, N, d_in + 4, d_out + 4) for P, N, d_in, d_out in LAYERS]
    check_lora_grad(device, dtype, shapes, rank, per_group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MANY_ITEMS)
def test_lora_grad_of_many_items(device, dtype, which):
    check_lora_grad(device, dtype, [MANY_ITEMS[which]], 4, True)


def check_lora_grad(device, dtype, shapes, rank, per_group) -> None:
    x = draw(dtype, *((P, N, d_in) for P, N, d_in, _ in shapes))
    delta = draw(dtype, *((P, N, d_out) for P, N, _, d_out in shapes))
    A = draw(dtype, *((*[P] * per_group, rank, d_in) for P, _, d_in, _ in shapes))
    scales = [0.5] * len(shapes)
    expected = reference.lora_grad(x, delta, A, [], scales)[1]
    assert_close(lora_grad(*on(device, x, delta, A), scales=scales).grad_B, expected, dtype)


@pytest.mark.parametrize("per_group", [False, True], ids=["one A", "A per group"])
@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 3), (torch.float32, 16), (torch.bfloat16, 8), (torch.bfloat16, 29)], ids=str
)
def test_lora_grad_tangent(device, dtype, rank, per_group):
    """Two directions, which share x, delta and A."""
    shapes = LAYERS if dtype == torch.bfloat16 else [(P, N, d_in + 4, d_out + 4) for P, N, d_in, d_out in LAYERS]
    x, dx = (draw(dtype, *((*K, P, N, d_in) for P, N, d_in, _ in shapes)) for K in ((), (2,)))
    delta, ddelta = (draw(dtype, *((*K, P, N, d_out) for P, N, _, d_out in shapes)) for K in ((), (2,)))
    A = draw(dtype, *((*[P] * per_group, rank, d_in) for P, _, d_in, _ in shapes))
    lists, scales = (x, delta, dx, ddelta, A), [0.5] * len(shapes)
    expected = reference.lora_grad_tangent(*lists, scales)
    assert_close(lora_grad_tangent(*on(device, *lists), scales=scales), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trials", "shared"), [(1, True), (3, False)])
def test_matching_loss(device, dtype, kind, trials, shared):
    """Layers of 1 and 0 elements, of one more than a chunk, at an address that is not aligned; images of odd sizes."""
    shapes = [(5,), (1,), (0,), (CHUNK + 1,), (2 * CHUNK,)]
    candidate = draw(dtype, *((trials, *s) for s in shapes))
    observed = draw(dtype, *((1 if shared else trials, *s) for s in shapes))
    images = draw(dtype, (trials, 2, 7, 33))[0]
    check_matching(device, dtype, kind, [*candidate, candidate[4][:, 1:]], [*observed, observed[4][:, 1:]], images)


def test_matching_loss_of_images_of_another_dtype(device):
    candidate, observed = draw(torch.bfloat16, (2, 40), (2, 7)), draw(torch.bfloat16, (2, 40), (1, 7))
    check_matching(device, torch.bfloat16, "l2", candidate, observed, draw(torch.float32, (2, 1, 5, 6))[0])


def test_matching_loss_of_more_layers_than_a_table_holds(device):
    candidate, observed = draw(torch.float32, *[(2, 3)] * 65), draw(torch.float32, *[(1, 3)] * 65)
    check_matching(device, torch.float32, "cosine", candidate, observed, draw(torch.float32, (2, 1, 1, 1))[0])


def check_matching(device, dtype, kind, candidate, observed, images) -> None:
    settings = ([1 / len(candidate)] * len(candidate), kind, images, 0.3, kind == "l2")
    loss, sums, *_ = reference.matching_loss(candidate, observed, *settings, False)
    expected = reference.matching_loss_backward(torch.ones_like(loss), candidate, observed, sums, *settings)
    candidate, observed, [images] = on(device, candidate, observed, [images])
    variables = [t.requires_grad_() for t in (*candidate, images)]
    settings = {"images": images, "kind": kind, "tv_weight": 0.3, "isotropic": kind == "l2"}
    found = matching_loss(candidate, observed, **settings)
    assert_close([found.detach()], [loss], dtype)
    if dtype != torch.bfloat16:  # which rounds the gradients
        assert_close(torch.autograd.grad(found.sum(), variables), [*expected[0], expected[1]], dtype)
    else:
        torch.autograd.grad(found.sum(), variables)


def test_factored_matching_loss(device):
    x, delta = draw(torch.float32, (2, 5, 8), (2, 3, 1)), draw(torch.float32, (2, 5, 4), (2, 3, 6))
    observed = draw(torch.float32, (1, 4, 8), (1, 6, 1))
    images = draw(torch.float32, (2, 1, 2, 3))[0]
    settings = ([0.5, 0.5], "layer_cosine", images, 0.3, False)
    loss, sums, saved = reference.factored_matching_loss(x, delta, observed, *settings)
    expected = reference.factored_matching_loss_backward(
        torch.ones_like(loss), x, delta, observed, sums, saved, *settings
    )
    x, delta, observed, [images] = on(device, x, delta, observed, [images])
    variables = [t.requires_grad_() for t in (*x, *delta, images)]
    found = factored_matching_loss(x, delta, observed, images=images, tv_weight=0.3)
    assert_close([found.detach()], [loss], torch.float32)
    got = torch.autograd.grad(found.sum(), variables)
    assert_close(got, [*expected[0], *expected[1], expected[2]], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (0,), (1025,), (2, 3, 7, 5)], ids=str)
def test_signed_adam_step(device, dtype, shape):
    image, gradient, first = draw(dtype, shape, shape, shape)
    tensors = [image, gradient, first, first.square()]
    (copies,) = on(device, [t.clone() for t in tensors])
    reference.signed_adam_step_(*tensors, 0.1, 0.9, 0.99, 1e-8, 2, 0.0, 1.0, True)
    signed_adam_step_(*copies, lr=0.1, betas=(0.9, 0.99), step=2, low=0.0, high=1.0, sign=True)
    assert_close(copies, tensors, dtype)
