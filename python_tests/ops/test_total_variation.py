"""total_variation: kernels, reference and formula agree, with both derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r2f_ext.ops import reference, total_variation

SHAPES = [(2, 3, 6, 5), (1, 1, 1, 1), (3, 1, 1, 7), (2, 2, 9, 1), (2, 1, 34, 67), (0, 3, 4, 4), (2, 0, 4, 4)]
SHAPES += [(2, 3, 0, 4), (2, 3, 4, 0), (1, 2, 2, 2), (2, 2, 5, 16), (2, 1, 4, 31)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}


def by_definition(images: Tensor, isotropic: bool) -> Tensor:
    """Pixel by pixel."""
    values = []
    for image in images.double():
        c, h, w = image.shape
        dy = [[[image[k, i + 1, j] - image[k, i, j] for j in range(w)] for i in range(h - 1)] for k in range(c)]
        dx = [[[image[k, i, j + 1] - image[k, i, j] for j in range(w - 1)] for i in range(h)] for k in range(c)]
        if isotropic:
            total = sum(
                ((dx[k][i][j] if j < w - 1 else 0) ** 2 + (dy[k][i][j] if i < h - 1 else 0) ** 2 + 1e-12) ** 0.5
                for k in range(c)
                for i in range(h)
                for j in range(w)
            )
            values.append(float(total / max(c * h * w, 1)))
        else:
            rows, columns = sum(abs(d) for p in dy for r in p for d in r), sum(abs(d) for p in dx for r in p for d in r)
            values.append(float(rows / max(c * (h - 1) * w, 1)) + float(columns / max(c * h * (w - 1), 1)))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_definition_and_the_reference(device, shape, isotropic):
    for dtype, tolerance in TOLERANCE.items():
        images = torch.randn(shape).to(device, dtype)
        value = total_variation(images, isotropic)
        assert value.shape == shape[:1] and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if images[0:1].numel() < 100:
            torch.testing.assert_close(
                value.double().cpu(), by_definition(images, isotropic), rtol=tolerance, atol=tolerance
            )
        torch.testing.assert_close(value, reference.total_variation(images, isotropic), rtol=tolerance, atol=tolerance)
        grad = torch.rand(shape[0], device=device, dtype=value.dtype)
        got = torch.ops.r2f.total_variation_backward(grad, images, isotropic)
        expected = reference.total_variation_backward(grad, images, isotropic)
        torch.testing.assert_close(got, expected, rtol=1e-4 if dtype != torch.float64 else 1e-10, atol=tolerance)


def test_is_what_it_was_before_it_was_an_operator(device):
    images = torch.rand(4, 3, 32, 32, device=device)
    rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))
    columns = (images[..., :, 1:] - images[..., :, :-1]).abs().mean((1, 2, 3))
    torch.testing.assert_close(total_variation(images), rows + columns)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (1, 1, 1, 1), (1, 2, 1, 4), (1, 1, 3, 1)], ids=str)
def test_first_and_second_derivatives(device, shape, isotropic):
    images = torch.rand(shape, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: total_variation(x, isotropic), images)
    assert torch.autograd.gradgradcheck(lambda x: total_variation(x, isotropic), images)


def test_flat_images_have_no_gradient(device):
    images = torch.full((2, 3, 7, 9), 0.4, device=device).requires_grad_()
    for isotropic in (False, True):
        value = total_variation(images, isotropic)
        assert value.abs().max() < 2e-6
        assert not torch.autograd.grad(value.sum(), images)[0].any()


def test_any_strides_and_dtypes_of_the_gradient(device):
    images = torch.rand(2, 3, 20, 21, device=device)
    strided = images.to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(total_variation(strided), total_variation(images))
    half = images.bfloat16().requires_grad_()
    assert torch.autograd.grad(total_variation(half).sum(), half)[0].dtype == torch.bfloat16


def test_operator_rules(device):
    images = torch.rand(2, 3, 5, 6, device=device)
    for isotropic in (False, True):
        torch.library.opcheck(torch.ops.r2f.total_variation.default, (images, isotropic))
        grad = torch.rand(2, device=device)
        torch.library.opcheck(torch.ops.r2f.total_variation_backward.default, (grad, images, isotropic))


@pytest.mark.slow
def test_inside_torch_compile(device):
    images = torch.rand(2, 3, 5, 6, device=device).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return total_variation(x, isotropic=True).square().sum()

    (expected,) = torch.autograd.grad(loss(images), images)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(images), images)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("isotropic", [False, True])
def test_under_cuda_graph_capture(isotropic):
    images = torch.rand(2, 3, 20, 33, device="cuda").requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = total_variation(images, isotropic)
        return value, torch.autograd.grad(value.sum(), images)[0]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        images.mul_(-0.5)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"images must be \[T, c, h, w\]"):
        total_variation(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match="images must be float32"):
        total_variation(torch.zeros(1, 3, 4, 4).half())
