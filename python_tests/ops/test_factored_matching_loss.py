"""factored_matching_loss: the compiled kernels against the reference, both against matching_loss of dense gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from r2f_ext.ops import backend_of, build_information, factored_matching_loss, matching_loss, reference
from r2f_ext.ops.matching_loss import KINDS

SHAPES = [(5, 4, 7, 6), (1, 1, 2, 3), (33, 3, 17, 40), (65, 34, 130, 35), (32, 64, 16, 8)]  # N, M, d_in, d_out
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-5}
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0]


def make(trials, shared, factored, dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[list[Tensor]]:
    """x, delta, observed, observed_delta (empty unless factored)."""
    T = 1 if shared else trials
    x = [torch.randn(trials, N, i) for N, _, i, _ in shapes]
    delta = [1e-3 * torch.randn(trials, N, o) for N, _, _, o in shapes]
    observed = [torch.randn(T, M, i) if factored else 1e-2 * torch.randn(T, o, i) for _, M, i, o in shapes]
    observed_delta = [1e-4 * torch.randn(T, M, o) for _, M, _, o in shapes] if factored else []
    return [[t.to(device, dtype) for t in tensors] for tensors in (x, delta, observed, observed_delta)]


def dense(x, delta, observed, observed_delta) -> tuple[list[Tensor], list[Tensor]]:
    candidate = [d.double().mT @ t.double() for t, d in zip(x, delta, strict=True)]
    if not observed_delta:
        return candidate, [o.double() for o in observed]
    return candidate, [d.double().mT @ t.double() for t, d in zip(observed, observed_delta, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("trials", "shared"), [(1, True), (3, True), (3, False)])
def test_agrees_with_dense_gradients_and_the_reference(device, dtype, kind, factored, trials, shared):
    lists = make(trials, shared, factored, dtype, device)
    tolerance = TOLERANCE[dtype]
    loss = factored_matching_loss(*lists[:3], lists[3] or None, weights=WEIGHTS, kind=kind)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == (trials,)
    expected = matching_loss(*dense(*lists), weights=WEIGHTS, kind=kind)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    shares = [w / sum(WEIGHTS) for w in WEIGHTS]
    loss, sums, products = torch.ops.r2f.factored_matching_loss(*lists, shares, kind)
    _, expected, expected_products = reference.factored_matching_loss(*lists, shares, kind)
    scale = float(expected.abs().max())
    torch.testing.assert_close(sums, expected, rtol=10 * tolerance, atol=tolerance * scale)
    assert len(products) == len(expected_products)
    grad = torch.rand(trials, device=device, dtype=loss.dtype)
    inputs = (grad, *lists, expected, products, shares, kind)
    got = torch.ops.r2f.factored_matching_loss_backward(*inputs)
    want = reference.factored_matching_loss_backward(*inputs)
    for ours, theirs in zip(got[0] + got[1], want[0] + want[1], strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=10 * tolerance, atol=10 * tolerance * max(1e-3, float(theirs.abs().max()))
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_against_autograd_through_dense_gradients(device, kind, factored, shared):
    lists = make(2, shared, factored, torch.float64, device)
    variables = [t.requires_grad_() for tensors in lists for t in tensors]
    factor = torch.tensor([0.3, 2.0], dtype=torch.float64, device=device)
    loss = factored_matching_loss(*lists[:3], lists[3] or None, weights=WEIGHTS, kind=kind)
    plain = matching_loss(*dense(*lists), weights=WEIGHTS, kind=kind)
    torch.testing.assert_close(loss, plain)
    expected = torch.autograd.grad((plain * factor).sum(), variables)
    for wanted in (variables, variables[: 2 * len(SHAPES)]):  # with and without those of observed
        got = torch.autograd.grad((loss * factor).sum(), wanted, retain_graph=True)
        for g, e in zip(got, expected, strict=False):
            torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-9 * max(1.0, float(e.abs().max())))
    lists[2:] = [[t.detach() for t in tensors] for tensors in lists[2:]]
    loss = factored_matching_loss(*lists[:3], lists[3] or None, weights=WEIGHTS, kind=kind)
    got = torch.autograd.grad((loss * factor).sum(), variables[: 2 * len(SHAPES)])
    for g, e in zip(got, expected, strict=False):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-9 * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factored", [False, True])
def test_first_and_second_derivatives(device, kind, factored):
    x, delta, observed, observed_delta = make(2, True, factored, torch.float64, device, [(3, 2, 4, 3), (2, 2, 2, 5)])
    delta, observed_delta = ([1e3 * t for t in tensors] for tensors in (delta, observed_delta))
    variables = [t.requires_grad_() for t in (*x, *delta, *observed, *observed_delta)]

    def function(*tensors: Tensor) -> Tensor:
        star = tensors[6:] if factored else None
        return factored_matching_loss(tensors[:2], tensors[2:4], tensors[4:6], star, weights=[1.0, 2.0], kind=kind)

    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables)


@pytest.mark.parametrize("scale", [1e-6, 1e-22])
@pytest.mark.parametrize("factored", [False, True])
def test_tiny_deltas_lose_nothing(device, scale, factored):
    x, delta, observed, observed_delta = make(2, True, factored, torch.float32, device)
    small = [(1e3 * scale * d).requires_grad_() for d in delta]
    small_observed = [1e3 * scale * d for d in observed_delta]
    loss = factored_matching_loss(x, small, observed, small_observed or None)
    torch.testing.assert_close(loss, factored_matching_loss(x, delta, observed, observed_delta or None))
    grads = torch.autograd.grad(loss.sum(), small)
    assert all(torch.isfinite(g).all() for g in grads) and grads[0].any()


@pytest.mark.parametrize("factored", [False, True])
def test_zeros_nans_and_empty_tensors(device, factored):
    x, delta, observed, observed_delta = make(2, False, factored, device=device, shapes=[(3, 2, 4, 5)])
    star = observed_delta or None
    nothing = [torch.zeros_like(d).requires_grad_() for d in delta]
    loss = factored_matching_loss(x, nothing, observed, star)
    assert loss.tolist() == [1.0, 1.0] and not torch.autograd.grad(loss.sum(), nothing)[0].any()
    assert torch.isnan(factored_matching_loss(x, delta, [o * float("nan") for o in observed], star)).all()
    for shape in [(0, 2, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)] + [(3, 0, 4, 5)] * factored:
        lists = make(2, True, factored, device=device, shapes=[shape])
        leaf = lists[0][0].requires_grad_()
        loss = factored_matching_loss(*lists[:3], lists[3] or None)
        assert loss.tolist() == [1.0, 1.0]
        assert not torch.autograd.grad(loss.sum(), leaf)[0].any()
    lists = make(0, True, factored, device=device)
    assert factored_matching_loss(*lists[:3], lists[3] or None).shape == (0,)


def test_any_strides_deterministic_and_independent_of_the_other_trials(device):
    lists = make(4, False, True, device=device)
    strided = [[t.mT.contiguous().mT for t in tensors] for tensors in lists]
    strided[0][0] = torch.randn(141, device=device)[1:].view(4, 5, 7).copy_(lists[0][0])  # not aligned
    loss = factored_matching_loss(*lists)
    assert torch.equal(factored_matching_loss(*lists), loss)
    torch.testing.assert_close(factored_matching_loss(*strided), loss)
    if backend_of("factored_matching_loss", device.type) == "cpu":
        assert torch.equal(factored_matching_loss(*[[t[2:3] for t in tensors] for tensors in lists]), loss[2:3])


def test_gradients_follow_the_dtype_of_the_input(device):
    lists = make(2, True, True, torch.bfloat16, device)
    variables = [t.requires_grad_() for tensors in lists for t in tensors]
    factored_matching_loss(*lists).sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in variables)


@pytest.mark.parametrize("factored", [False, True])
def test_operator_rules(device, factored):
    lists = make(2, True, factored, device=device)
    settings = ([0.2] * 5, "cosine")
    torch.library.opcheck(torch.ops.r2f.factored_matching_loss.default, (*lists, *settings))
    loss, sums, products = torch.ops.r2f.factored_matching_loss(*lists, *settings)
    inputs = (loss, *lists, sums, products, *settings)
    torch.library.opcheck(torch.ops.r2f.factored_matching_loss_backward.default, inputs)


@pytest.mark.slow
def test_inside_torch_compile(device):
    x, delta, observed, _ = make(2, True, False, device=device, shapes=[(3, 2, 4, 5), (2, 2, 3, 3)])
    variables = [t.requires_grad_() for t in (*x, *delta)]

    def loss(*tensors: Tensor) -> Tensor:
        return factored_matching_loss(tensors[:2], tensors[2:], observed).square().sum()

    expected = torch.autograd.grad(loss(*variables), variables)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*variables), variables)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("factored", [False, True])
def test_under_cuda_graph_capture(factored):
    lists = make(2, True, factored, device="cuda")
    variables = [t.requires_grad_() for t in (*lists[0], *lists[1])]

    def step() -> tuple[Tensor, ...]:
        loss = factored_matching_loss(*lists[:3], lists[3] or None)
        return loss, *torch.autograd.grad(loss.sum(), variables)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        lists[1][0].mul_(-0.5)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected)


GOOD = {"x": [torch.zeros(2, 3, 4)], "delta": [torch.zeros(2, 3, 5)], "observed": [torch.zeros(1, 5, 4)]}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": []}, ValueError, "same length"),
        ({"delta": GOOD["delta"] * 2}, ValueError, "same length"),
        ({"x": [torch.zeros(2, 4)]}, ValueError, r"x must be tensors \[T, N, d_in\]"),
        ({"delta": [torch.zeros(2, 4, 5)]}, ValueError, r"delta \[T, N, d_out\]"),
        ({"observed": [torch.zeros(1, 4, 5)]}, ValueError, r"observed must be tensors \[T, d_out, d_in\]"),
        ({"observed": [torch.zeros(3, 5, 4)]}, ValueError, "or 1 for T"),
        ({"observed_delta": [torch.zeros(1, 5, 5)]}, None, ""),
        ({"observed_delta": [torch.zeros(1, 6, 5)]}, ValueError, r"observed_delta \[T, M, d_out\]"),
        ({"delta": [torch.zeros(2, 3, 5).double()]}, TypeError, "share one dtype"),
        ({"x": [torch.zeros(2, 3, 4).half()]}, TypeError, "float16"),
        ({"delta": [torch.zeros(2, 3, 5, device="meta")]}, ValueError, "one device"),
        ({"kind": "cos"}, ValueError, "kind must be one of"),
        ({"weights": [1.0, 1.0]}, ValueError, "weights must be 1 numbers"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    if error is None:
        assert factored_matching_loss(**{**GOOD, **change}).shape == (2,)
        return
    with pytest.raises(error, match=words):
        factored_matching_loss(**{**GOOD, **change})


@pytest.mark.skipif(not build_information()["loaded"], reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree(isa):
    code = (
        "import torch; from r2f_ext.ops import reference; torch.manual_seed(0); op = torch.ops.r2f;"
        "lists = [[torch.randn(2, *s).double()] for s in [(37, 35), (37, 50), (33, 35), (33, 50)]];"
        "got = op.factored_matching_loss(*lists, [1.], 'layer_cosine'); g = torch.ones(2).double();"
        "want = reference.factored_matching_loss(*lists, [1.], 'layer_cosine');"
        "a = op.factored_matching_loss_backward(g, *lists, want[1], [], [1.], 'layer_cosine');"
        "b = reference.factored_matching_loss_backward(g, *lists, want[1], [], [1.], 'layer_cosine');"
        "print(all(torch.allclose(x, y) for x, y in [*zip(got[:2], want[:2]), (a[0][0], b[0][0]), (a[1][0], b[1][0])]))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "R2F_CPU_ISA": isa}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip() == "True"
