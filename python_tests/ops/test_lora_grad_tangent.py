"""lora_grad_tangent: the kernels against the reference, both against forward-mode derivatives of the definition."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from r2f_ext.ops import lora_grad, lora_grad_tangent, reference

SHAPES = [(2, 3, 5, 33, 17), (1, 4, 65, 128, 96), (3, 2, 17, 16, 130), (1, 1, 1, 1, 1)]  # P, K, N, d_in, d_out
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}  # bfloat16 is summed in float32


class Inputs(NamedTuple):
    """What the operator takes."""

    x: list[Tensor]
    delta: list[Tensor]
    dx: list[Tensor]
    ddelta: list[Tensor]
    A: list[Tensor]
    scales: list[float]

    def call(self) -> list[Tensor]:
        return lora_grad_tangent(*self[:5], scales=self.scales)

    def layer(self, index: int) -> list[Tensor]:
        return [each[index] for each in self[:5]]


def make(shapes, rank, dtype=torch.float32, device="cpu", A_per_group=False) -> Inputs:
    inputs = Inputs([], [], [], [], [], [])
    for layer, (P, K, N, d_in, d_out) in enumerate(shapes):
        A = (P, rank, d_in) if A_per_group else (rank, d_in)
        shapes_of_layer = [(P, N, d_in), (P, N, d_out), (K, P, N, d_in), (K, P, N, d_out), A]
        for each, shape in zip(inputs[:5], shapes_of_layer, strict=True):
            each.append(torch.randn(shape).to(device, dtype))
        inputs.scales.append(0.5 + layer)
    return inputs


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.shape == expected.shape
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance * max(size, 1.0))


def as_documented(grad_B: Tensor) -> bool:
    """The layout of [..., d_out, r]: rows of r numbers on CUDA, else columns of d_out."""
    return grad_B.is_contiguous() if grad_B.is_cuda else grad_B.mT.is_contiguous()


def by_forward_mode(inputs: Inputs) -> list[Tensor]:
    """torch.func.jvp of scale G A^T with the dense G, direction by direction, in float64."""
    found = []
    for layer, scale in enumerate(inputs.scales):
        x, delta, dx, ddelta, A = (t.double() for t in inputs.layer(layer))

        def grad_B(a: Tensor, b: Tensor, A: Tensor = A, scale: float = scale) -> Tensor:
            return scale * ((b.mT @ a) @ A.mT)

        moved = [torch.func.jvp(grad_B, (x, delta), (dx[k], ddelta[k]))[1] for k in range(len(dx))]
        found.append(torch.stack(moved))
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
@pytest.mark.parametrize("A_per_group", [False, True])
def test_agrees_with_forward_mode_and_the_reference(device, dtype, rank, A_per_group):
    inputs = make(SHAPES, rank, dtype, device, A_per_group)
    result, plain = inputs.call(), reference.lora_grad_tangent(*inputs)
    for got, expected, by_reference in zip(result, by_forward_mode(inputs), plain, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and as_documented(got)
        assert_close(got, expected, TOLERANCE[dtype])
        assert_close(got, by_reference, TOLERANCE[dtype])


def test_agrees_with_the_double_backward_and_with_differences_of_lora_grad(device):
    inputs = make([(2, 1, 7, 12, 9)], 3, torch.float64, device)
    x, delta, dx, ddelta, A = inputs.layer(0)
    (tangent,) = inputs.call()

    def grad_B(a: Tensor, b: Tensor) -> Tensor:
        return lora_grad([a], [b], [A], scales=inputs.scales).grad_B[0]

    _, by_autograd = torch.autograd.functional.jvp(grad_B, (x, delta), (dx[0], ddelta[0]))
    step = 1e-6
    after, before = (grad_B(x + sign * dx[0], delta + sign * ddelta[0]) for sign in (step, -step))
    torch.testing.assert_close(tangent[0], by_autograd)
    torch.testing.assert_close(tangent[0], (after - before) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)])
@pytest.mark.parametrize("A_per_group", [False, True])
def test_empty_inputs_give_zeros(device, shape, A_per_group):
    P, K, _, _, d_out = shape
    (result,) = make([shape], 2, device=device, A_per_group=A_per_group).call()
    assert result.shape == (K, P, d_out, 2) and not result.any()


def test_any_strides(device):
    inputs = make([(2, 3, 6, 20, 14)], 4, device=device, A_per_group=True)
    strided = Inputs(*([each[0].mT.contiguous().mT] for each in inputs[:5]), inputs.scales)
    assert_close(strided.call()[0], inputs.call()[0], 1e-6)
    unaligned = inputs._replace(ddelta=[torch.randn(2 * 3 * 6 * 14 + 1, device=device)[1:].view(3, 2, 6, 14)])
    assert_close(unaligned.call()[0], by_forward_mode(unaligned)[0], 1e-5)


def test_a_direction_does_not_depend_on_the_others(device):
    inputs = make([(3, 5, 20, 48, 32)], 8, device=device)
    alone = inputs._replace(dx=[inputs.dx[0][3:4]], ddelta=[inputs.ddelta[0][3:4]])
    assert_close(inputs.call()[0][3:4], alone.call()[0], 1e-6)


@pytest.mark.parametrize("A_per_group", [False, True])
def test_derivatives_of_the_raw_operator(device, A_per_group):
    inputs = make([(2, 2, 3, 4, 3), (1, 2, 2, 3, 4)], 2, torch.float64, device, A_per_group)
    variables = [t.requires_grad_() for each in inputs[:5] for t in each]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        lists = [list(tensors[i : i + 2]) for i in range(0, len(tensors), 2)]
        return tuple(torch.ops.r2f.lora_grad_tangent(*lists, inputs.scales))

    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables)


def test_gradients_follow_the_dtype_of_the_input():
    inputs = make([(2, 2, 3, 4, 5)], 2, torch.bfloat16)
    tensors = [t.requires_grad_() for t in inputs.layer(0)]
    inputs.call()[0].sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in tensors)


def test_operator_rules(device):
    inputs = make([(2, 2, 5, 6, 7), (1, 3, 2, 4, 3)], 3, device=device)
    for each in inputs[:5]:
        for tensor in each:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.r2f.lora_grad_tangent.default, tuple(inputs))


@pytest.mark.slow
def test_inside_torch_compile(device):
    inputs = make([(2, 2, 5, 6, 7)], 3, device=device)
    x = inputs.x[0].requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return inputs._replace(x=[x]).call()[0].square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inside_a_cuda_graph():
    inputs = make([(2, 3, 7, 33, 20)], 3, device="cuda")
    (expected,) = inputs.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (result,) = inputs.call()
    graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \[P, N, d_in\]"),
        ({"delta": torch.zeros(2, 4, 5)}, ValueError, "same P and N; layer 1 has"),
        ({"dx": torch.zeros(2, 3, 4)}, ValueError, r"dx must be \[K, P, N, d_in\]"),
        ({"ddelta": torch.zeros(7, 2, 3, 5)}, ValueError, "with the K of dx"),
        ({"A": torch.zeros(2, 9)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(3, 2, 4)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(0, 4)}, ValueError, "rank must be at least 1"),
        ({"ddelta": torch.zeros(6, 2, 3, 5).double()}, TypeError, "one dtype.*ddelta float64"),
        ({"x": torch.zeros(2, 3, 4).half()}, TypeError, "x float16"),
        ({"A": torch.zeros(2, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_errors_name_the_argument_and_the_layer(change, error, words):
    good = {
        "x": torch.zeros(2, 3, 4),
        "delta": torch.zeros(2, 3, 5),
        "dx": torch.zeros(6, 2, 3, 4),
        "ddelta": torch.zeros(6, 2, 3, 5),
        "A": torch.zeros(2, 4),
    }
    lists = {name: [tensor, change.get(name, tensor)] for name, tensor in good.items()}
    with pytest.raises(error, match=words):
        lora_grad_tangent(**lists, scales=[1.0, 1.0])


def test_lists_of_different_lengths_are_refused():
    inputs = make([(2, 2, 3, 4, 5)] * 2, 2)
    with pytest.raises(ValueError, match="lora_grad_tangent: lists of one length"):
        inputs._replace(A=inputs.A[:1]).call()
