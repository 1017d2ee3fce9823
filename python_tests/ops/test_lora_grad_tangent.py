"""lora_grad_tangent: the kernels against the reference, both against forward-mode derivatives of the definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from r2f_ext.ops import build_information, lora_grad, lora_grad_tangent, reference

SHAPES = [(2, 3, 5, 33, 17), (1, 4, 65, 128, 96), (3, 2, 17, 16, 130), (1, 1, 1, 1, 1)]  # P, K, N, d_in, d_out
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}  # bfloat16 is summed in float32
KINDS = ["none", "shared", "per group"]


def make(shape, rank, dtype=torch.float32, device="cpu", A_per_group=False, B="none", moves="both"):
    """x, delta, dx, ddelta, A, B"""
    P, K, N, d_in, d_out = shape
    A = torch.randn(P, rank, d_in) if A_per_group else torch.randn(rank, d_in)
    factors = {"none": None, "shared": torch.randn(d_out, rank), "per group": torch.randn(P, d_out, rank)}
    dx = torch.randn(K, P, N, d_in) if moves != "ddelta" else None
    ddelta = torch.randn(K, P, N, d_out) if moves != "dx" else None
    tensors = (torch.randn(P, N, d_in), torch.randn(P, N, d_out), dx, ddelta, A, factors[B])
    return [None if t is None else t.to(device, dtype) for t in tensors]


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.shape == expected.shape
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance * max(size, 1.0))


def gradients(x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """What is differentiated: from the dense G."""
    G = delta.mT @ x
    B = x.new_zeros(delta.shape[2], A.shape[-2]) if B is None else B
    return scale * (B.mT @ G), scale * (G @ A.mT)


def forward_mode(x, delta, dx, ddelta, A, B, scale) -> tuple[Tensor, Tensor]:
    """torch.func.jvp, direction by direction, in float64."""
    x, delta, dx, ddelta, A, B = (None if t is None else t.double() for t in (x, delta, dx, ddelta, A, B))
    K = len(dx if dx is not None else ddelta)
    dx = x.new_zeros(K, *x.shape) if dx is None else dx
    ddelta = x.new_zeros(K, *delta.shape) if ddelta is None else ddelta
    tangents = [
        torch.func.jvp(lambda a, b: gradients(a, b, A, B, scale), (x, delta), (dx[k], ddelta[k]))[1] for k in range(K)
    ]
    return torch.stack([a for a, _ in tangents]), torch.stack([b for _, b in tangents])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
@pytest.mark.parametrize("B", KINDS)
@pytest.mark.parametrize("moves", ["both", "dx", "ddelta"])
def test_agrees_with_forward_mode_and_the_reference(device, dtype, rank, B, moves):
    for shape in SHAPES:
        inputs = make(shape, rank, dtype, device, B == "per group", B, moves)
        result = lora_grad_tangent(*inputs, scale=0.5)
        expected_A, expected_B = forward_mode(*inputs, 0.5)
        assert result.grad_B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(result.grad_B, expected_B, TOLERANCE[dtype])
        if B == "none":
            assert result.grad_A is None
        else:
            assert_close(result.grad_A, expected_A, TOLERANCE[dtype])
        raw = torch.ops.r2f.lora_grad_tangent(*inputs, 0.5)
        for got, want in zip(raw, reference.lora_grad_tangent(*inputs, 0.5), strict=True):
            assert_close(got, want, TOLERANCE[dtype])


def test_agrees_with_the_double_backward_and_with_differences_of_lora_grad(device):
    x, delta, dx, ddelta, A, B = make((2, 1, 7, 12, 9), 3, torch.float64, device, B="shared")
    tangent = lora_grad_tangent(x, delta, dx, ddelta, A, B, scale=0.5)

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        result = lora_grad(a, b, A, B, scale=0.5)
        return result.grad_A, result.grad_B

    _, by_autograd = torch.autograd.functional.jvp(both, (x, delta), (dx[0], ddelta[0]))
    step = 1e-6
    after, before = (both(x + sign * dx[0], delta + sign * ddelta[0]) for sign in (step, -step))
    for got, want, a, b in zip(tangent, by_autograd, after, before, strict=True):
        torch.testing.assert_close(got[0], want)
        torch.testing.assert_close(got[0], (a - b) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)])
@pytest.mark.parametrize("B", KINDS)
def test_empty_inputs_give_zeros(device, shape, B):
    P, K, _, d_in, d_out = shape
    result = lora_grad_tangent(*make(shape, 2, device=device, B=B), scale=1.0)
    assert result.grad_B.shape == (K, P, d_out, 2)
    if shape[2] == 0 or B == "none":
        assert not result.grad_B.any() or shape[2] > 0
    if B != "none":
        assert result.grad_A.shape == (K, P, 2, d_in)


def test_no_tokens_give_zeros(device):
    result = lora_grad_tangent(*make((2, 3, 0, 8, 5), 2, device=device, B="shared"), scale=1.0)
    assert not result.grad_A.any() and not result.grad_B.any()


def test_any_strides(device):
    inputs = make((2, 3, 6, 20, 14), 4, device=device, A_per_group=True, B="per group")
    strided = [t.mT.contiguous().mT for t in inputs]
    for got, want in zip(lora_grad_tangent(*strided, scale=1.0), lora_grad_tangent(*inputs, scale=1.0), strict=True):
        assert_close(got, want, 1e-6)
    unaligned = torch.randn(2 * 3 * 6 * 14 + 1, device=device)[1:].view(3, 2, 6, 14)
    inputs[3] = unaligned
    assert_close(lora_grad_tangent(*inputs, scale=1.0).grad_B, forward_mode(*inputs, 1.0)[1], 1e-5)


def test_a_direction_does_not_depend_on_the_others(device):
    x, delta, dx, ddelta, A, B = make((3, 5, 20, 48, 32), 8, device=device, B="shared")
    all_of_them = lora_grad_tangent(x, delta, dx, ddelta, A, B, scale=1.0)
    alone = lora_grad_tangent(x, delta, dx[3:4], ddelta[3:4], A, B, scale=1.0)
    for got, want in zip(all_of_them, alone, strict=True):
        assert_close(got[3:4], want, 1e-6)


@pytest.mark.parametrize("B", KINDS)
@pytest.mark.parametrize("moves", ["both", "dx", "ddelta"])
def test_derivatives(device, B, moves):
    inputs = make((2, 2, 3, 4, 3), 2, torch.float64, device, B == "per group", B, moves)
    variables = [t.requires_grad_() for t in inputs if t is not None]

    def tangent(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        result = lora_grad_tangent(*(None if t is None else next(left) for t in inputs), scale=0.7)
        return (result.grad_B,) if result.grad_A is None else tuple(result)

    assert torch.autograd.gradcheck(tangent, variables)
    assert torch.autograd.gradgradcheck(tangent, variables)


def test_gradients_follow_the_dtype_of_the_input():
    inputs = [t.requires_grad_() for t in make((2, 2, 3, 4, 5), 2, torch.bfloat16, B="shared")]
    sum(t.sum() for t in lora_grad_tangent(*inputs, scale=1.0)).backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in inputs)


@pytest.mark.parametrize("B", ["none", "per group"])
@pytest.mark.parametrize("moves", ["both", "dx", "ddelta"])
def test_operator_rules(device, B, moves):
    inputs = make((2, 2, 5, 6, 7), 3, device=device, B=B, moves=moves)
    torch.library.opcheck(torch.ops.r2f.lora_grad_tangent.default, (*inputs, 0.5))


@pytest.mark.slow
def test_inside_torch_compile(device):
    x, *others = make((2, 2, 5, 6, 7), 3, device=device, B="shared")
    x.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return lora_grad_tangent(x, *others, scale=0.5).grad_B.square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inside_a_cuda_graph():
    inputs = make((2, 3, 7, 33, 20), 3, device="cuda", B="shared")
    expected = lora_grad_tangent(*inputs, scale=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = lora_grad_tangent(*inputs, scale=0.5)
    graph.replay()
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \[P, N, d_in\]"),
        ({"delta": torch.zeros(2, 4, 5)}, ValueError, "same P and N"),
        ({"dx": None, "ddelta": None}, ValueError, "dx or ddelta is needed"),
        ({"dx": torch.zeros(2, 3, 4)}, ValueError, r"dx must be \[K, P, N, d_in\]"),
        ({"ddelta": torch.zeros(7, 2, 3, 5)}, ValueError, "with the K of dx"),
        ({"A": torch.zeros(2, 9)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(3, 2, 4)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(0, 4)}, ValueError, "rank must be at least 1"),
        ({"B": torch.zeros(2, 5)}, ValueError, r"B must be \[d_out, r\]"),
        ({"ddelta": torch.zeros(6, 2, 3, 5).double()}, TypeError, "one dtype.*ddelta float64"),
        ({"x": torch.zeros(2, 3, 4).half()}, TypeError, "x float16"),
        ({"A": torch.zeros(2, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    good = {
        "x": torch.zeros(2, 3, 4),
        "delta": torch.zeros(2, 3, 5),
        "dx": torch.zeros(6, 2, 3, 4),
        "ddelta": torch.zeros(6, 2, 3, 5),
        "A": torch.zeros(2, 4),
        "B": None,
    }
    with pytest.raises(error, match=words):
        lora_grad_tangent(**{**good, **change}, scale=1.0)


@pytest.mark.skipif(not build_information()["loaded"], reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree(isa):
    code = (
        "import torch; from r2f_ext.ops import reference; torch.manual_seed(0);"
        "shapes = [(2, 26, 33), (2, 26, 70), (3, 2, 26, 33), (3, 2, 26, 70), (11, 33), (70, 11)];"
        "inputs = [torch.randn(*s).double() for s in shapes];"
        "got = torch.ops.r2f.lora_grad_tangent(*inputs, .5); want = reference.lora_grad_tangent(*inputs, .5);"
        "print(max((g - w).abs().max().item() for g, w in zip(got, want)) < 1e-11)"
    )
    environment = {**os.environ, "R2F_CPU_ISA": isa}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.strip() == "True"
