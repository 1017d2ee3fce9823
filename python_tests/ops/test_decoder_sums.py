"""decoder_sums and decoder_cosine_loss: the compiled kernels against the reference, both against dense gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.ops import backend_of, decoder_cosine_loss, decoder_reference

SHAPES = [(5, 4, 7, 6), (1, 1, 2, 3), (33, 16, 17, 40), (9, 3, 130, 35), (65, 2, 200, 1300)]  # N, k, d_in, d_out
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-5}


def make(b=3, dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[list[Tensor]]:
    """coefficients, bases, x, delta"""
    lists = [
        [torch.randn(b, k) for _, k, _, _ in shapes],
        [torch.randn(k, d_out * d_in) for _, k, d_in, d_out in shapes],
        [torch.randn(b, N, d_in) for N, _, d_in, _ in shapes],
        [1e-3 * torch.randn(b, N, d_out) for N, _, _, d_out in shapes],
    ]
    return [[t.to(device, dtype) for t in tensors] for tensors in lists]


def dense(coefficients, bases, x, delta) -> list[tuple[Tensor, Tensor]]:
    """Decoded and true gradients of each layer, in float64: [b, d_out d_in]."""
    layers = zip(coefficients, bases, x, delta, strict=True)
    return [
        (
            c.double() @ basis.double(),
            torch.einsum("bno,bni->boi", d.double(), t.double()).reshape(len(c), basis.shape[1]),
        )
        for c, basis, t, d in layers
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("b", [1, 3, 17, 70])
def test_agrees_with_dense_gradients_and_the_reference(device, dtype, b):
    lists = make(b, dtype, device)
    loss, sums = decoder_cosine_loss(*lists)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == (len(SHAPES), b)
    tolerance = TOLERANCE[dtype]
    for layer, (decoded, true) in enumerate(dense(*lists)):
        expected = 1 - F.cosine_similarity(decoded, true, dim=1, eps=0)
        torch.testing.assert_close(loss[layer].double(), expected, rtol=tolerance, atol=tolerance)
        square, true_square = decoded.square().sum(1), true.square().sum(1)
        torch.testing.assert_close(sums.square[layer], square, rtol=tolerance, atol=0)
        torch.testing.assert_close(sums.true_square[layer], true_square, rtol=tolerance, atol=0)
        scale = float((square * true_square).sqrt().max())
        torch.testing.assert_close(sums.inner[layer], (decoded * true).sum(1), rtol=0, atol=tolerance * scale)
    grad_sums = torch.randn(len(SHAPES), b, 3, dtype=torch.float64, device=device)
    got = torch.ops.r2f.decoder_sums_backward(grad_sums, *lists, True)
    want = decoder_reference.decoder_sums_backward(grad_sums, *lists, True)
    for ours, theirs in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert ours.dtype == loss.dtype
        atol = 5 * tolerance * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    only, nothing = torch.ops.r2f.decoder_sums_backward(grad_sums, *lists, False)
    assert not nothing and all(torch.equal(x, y) for x, y in zip(only, got[0], strict=True))


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_against_autograd_through_dense_gradients(device, frozen):
    """A cosine, a log-norm and a squared error in one loss."""
    lists = make(4, torch.float64, device)
    variables = [t.requires_grad_() for t in (lists[0] if frozen else [*lists[0], *lists[1]])]
    expected = torch.zeros((), dtype=torch.float64, device=device)
    for decoded, true in dense(*lists):
        expected = expected + (1 - F.cosine_similarity(decoded, true, dim=1, eps=0)).sum()
        expected = expected + (decoded.norm(dim=1).log() - true.norm(dim=1).log()).square().sum()
        expected = expected + (decoded - true).square().sum()
    loss, sums = decoder_cosine_loss(*lists)
    total = loss.sum() + (0.5 * (sums.square.log() - sums.true_square.log())).square().sum()
    total = total + (sums.square - 2 * sums.inner + sums.true_square).sum()
    torch.testing.assert_close(total, expected)
    want = torch.autograd.grad(expected, variables)
    for g, e in zip(torch.autograd.grad(total, variables), want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11 * float(e.abs().max()))


def test_first_derivatives(device):
    coefficients, bases, x, delta = make(2, torch.float64, device, [(3, 2, 4, 3), (2, 3, 2, 5)])
    delta = [1e3 * d for d in delta]
    variables = [t.requires_grad_() for t in (*coefficients, *bases)]

    def function(*t: Tensor) -> tuple[Tensor, ...]:
        loss, sums = decoder_cosine_loss(t[:2], t[2:], x, delta)
        return loss, *sums

    assert torch.autograd.gradcheck(function, variables)


@pytest.mark.parametrize("scale", [1e-6, 1e-22])
def test_tiny_deltas_lose_nothing(device, scale):
    coefficients, bases, x, delta = make(2, device=device)
    variables = [t.requires_grad_() for t in coefficients]
    small = [1e3 * scale * d for d in delta]
    loss, sums = decoder_cosine_loss(coefficients, bases, x, small)
    torch.testing.assert_close(loss, decoder_cosine_loss(coefficients, bases, x, delta)[0])
    assert sums.true_square.all()
    expected = torch.autograd.grad(decoder_cosine_loss(coefficients, bases, x, delta)[0].sum(), variables)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), variables), expected)


def test_zeros_and_nans(device):
    coefficients, bases, x, delta = make(2, device=device, shapes=[(3, 2, 4, 5)])
    nothing = [torch.zeros_like(coefficients[0]).requires_grad_()]
    loss, _ = decoder_cosine_loss(nothing, bases, x, delta)
    assert loss.tolist() == [[1.0, 1.0]] and not torch.autograd.grad(loss.sum(), nothing)[0].any()
    c = [coefficients[0].requires_grad_()]
    loss, _ = decoder_cosine_loss(c, bases, x, [torch.zeros_like(delta[0])])
    assert loss.tolist() == [[1.0, 1.0]] and not torch.autograd.grad(loss.sum(), c)[0].any()
    assert torch.isnan(decoder_cosine_loss(c, bases, [x[0] * float("nan")], delta)[0]).all()


@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)])
def test_empty_tensors(device, shape):
    coefficients, bases, x, delta = make(2, device=device, shapes=[shape])
    variables = [*coefficients, *bases]
    loss, _ = decoder_cosine_loss([variables[0].requires_grad_()], [variables[1].requires_grad_()], x, delta)
    assert loss.tolist() == [[1.0, 1.0]]
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), variables))
    assert decoder_cosine_loss(*make(0, device=device))[0].shape == (len(SHAPES), 0)


def test_any_strides_and_deterministic(device):
    lists = make(4, device=device)
    strided = [[t.mT.contiguous().mT for t in tensors] for tensors in lists]
    strided[2][0] = torch.randn(141, device=device)[1:].view(4, 5, 7).copy_(lists[2][0])  # off every boundary
    basis = lists[1][3]
    strided[1][3] = torch.cat([basis, basis], dim=1)[:, : basis.shape[1]]  # rows further apart than they are long
    sums = torch.ops.r2f.decoder_sums(*lists)
    assert torch.equal(torch.ops.r2f.decoder_sums(*lists), sums)
    torch.testing.assert_close(torch.ops.r2f.decoder_sums(*strided), sums, rtol=1e-5, atol=1e-5)
    grads = torch.ops.r2f.decoder_sums_backward(sums, *lists, True)
    again = torch.ops.r2f.decoder_sums_backward(sums, *lists, True)
    assert all(torch.equal(x, y) for x, y in zip(grads[0] + grads[1], again[0] + again[1], strict=True))


def test_layers_in_one_tensor_and_dtype_of_gradients(device):
    lists = make(3, torch.bfloat16, device, [(5, 4, 7, 6)] * 2)
    coefficients, bases, x, delta = (torch.stack(tensors) for tensors in lists)
    loss, _ = decoder_cosine_loss(coefficients.requires_grad_(), bases.requires_grad_(), x, delta)
    torch.testing.assert_close(loss, decoder_cosine_loss(*lists)[0])
    loss.sum().backward()
    assert all(
        t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape and t.grad.any() for t in (coefficients, bases)
    )


def test_operator_rules(device):
    lists = make(2, device=device)
    torch.library.opcheck(torch.ops.r2f.decoder_sums.default, lists)
    grad = torch.randn(len(SHAPES), 2, 3, dtype=torch.float64, device=device)
    for to_bases in (True, False):
        torch.library.opcheck(torch.ops.r2f.decoder_sums_backward.default, (grad, *lists, to_bases))


@pytest.mark.slow
def test_inside_torch_compile(device):
    coefficients, bases, x, delta = make(2, device=device, shapes=[(3, 2, 4, 5), (2, 2, 3, 3)])
    variables = [t.requires_grad_() for t in (*coefficients, *bases)]

    def loss(*t: Tensor) -> Tensor:
        return decoder_cosine_loss(t[:2], t[2:], x, delta)[0].square().sum()

    expected = torch.autograd.grad(loss(*variables), variables)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*variables), variables)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_under_cuda_graph_capture():
    lists = make(2, device="cuda")
    variables = [t.requires_grad_() for t in (*lists[0], *lists[1])]

    def step() -> tuple[Tensor, ...]:
        loss, _ = decoder_cosine_loss(*lists)
        return loss, *torch.autograd.grad(loss.sum(), variables)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lists[3][0].mul_(-0.5)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected)


GOOD = {
    "coefficients": [torch.zeros(2, 3)],
    "bases": [torch.zeros(3, 20)],
    "x": [torch.zeros(2, 6, 4)],
    "delta": [torch.zeros(2, 6, 5)],
}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({}, None, ""),
        ({"x": []}, ValueError, "same number of layers"),
        ({"coefficients": [torch.zeros(1, 3)]}, ValueError, r"x must be \[b, N, d_in\]"),
        ({"delta": [torch.zeros(2, 7, 5)]}, ValueError, r"delta \[b, N, d_out\]; layer 0"),
        ({"bases": [torch.zeros(3, 21)]}, ValueError, r"bases \[k, d_out d_in\]"),
        ({"bases": [torch.zeros(3, 20).double()]}, TypeError, "share one dtype"),
        ({"x": [torch.zeros(2, 6, 4).half()]}, TypeError, "float16"),
        ({"bases": [torch.zeros(3, 20, device="meta")]}, ValueError, "one device"),
        ({"x": [torch.zeros(2, 6, 4, requires_grad=True)]}, ValueError, "detach"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    if error is None:
        assert decoder_cosine_loss(**GOOD)[0].shape == (1, 2)
        return
    with pytest.raises(error, match=words):
        decoder_cosine_loss(**{**GOOD, **change})


@pytest.mark.skipif(backend_of("decoder_sums", "cpu") != "cpu", reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree(isa):
    code = (
        "import torch; from r2f_ext.ops import decoder_reference; torch.manual_seed(0);"
        "lists = [[torch.randn(2, *s).double()] for s in [(3,), (37, 35), (37, 50)]];"
        "lists.insert(1, [torch.randn(3, 35 * 50).double()]); g = torch.randn(1, 2, 3).double();"
        "got, want = torch.ops.r2f.decoder_sums(*lists), decoder_reference.decoder_sums(*lists);"
        "a = torch.ops.r2f.decoder_sums_backward(g, *lists, True);"
        "b = decoder_reference.decoder_sums_backward(g, *lists, True);"
        "print(all(torch.allclose(x, y) for x, y in [(got, want), (a[0][0], b[0][0]), (a[1][0], b[1][0])]))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "R2F_CPU_ISA": isa}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip() == "True"
