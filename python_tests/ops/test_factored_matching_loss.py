"""factored_matching_loss: the compiled kernels against the reference, both against matching_loss of dense gradients."""

from __future__ import annotations

import pytest
import torch
from graph_cases import check_replay
from torch import Tensor

from r2f_ext.ops import factored_matching_loss as factored_matching_loss_of
from r2f_ext.ops import matching_loss, reference
from r2f_ext.ops.matching_loss import KINDS

SHAPES = [(5, 7, 6), (1, 2, 3), (33, 17, 40), (65, 130, 35), (32, 16, 8)]  # N, d_in, d_out
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-5}
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0]


def make(trials, shared, dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[list[Tensor]]:
    """x, delta, observed."""
    x = [torch.randn(trials, N, i) for N, i, _ in shapes]
    delta = [1e-3 * torch.randn(trials, N, o) for N, _, o in shapes]
    observed = [1e-2 * torch.randn(1 if shared else trials, o, i) for _, i, o in shapes]
    return [[t.to(device, dtype) for t in tensors] for tensors in (x, delta, observed)]


def blank(trials, device="cpu") -> Tensor:
    """Images without any variation."""
    return torch.zeros(trials, 1, 1, 1, device=device)


def factored_matching_loss(x, delta, observed, images=None, **settings) -> Tensor:
    """The operator, with images without any variation unless given."""
    if images is None:
        images = blank(len(x[0]) if x else 0, x[0].device if x else "cpu")
    return factored_matching_loss_of(x, delta, observed, images=images, **settings)


def dense_loss(lists, images=None, **settings) -> Tensor:
    """`matching_loss` of the gradients written out."""
    images = blank(len(lists[0][0]), lists[0][0].device) if images is None else images
    return matching_loss(*dense(*lists), images=images, **settings)


def dense(x, delta, observed) -> tuple[list[Tensor], list[Tensor]]:
    return [d.double().mT @ t.double() for t, d in zip(x, delta, strict=True)], [o.double() for o in observed]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trials", "shared"), [(1, True), (3, True), (3, False)])
def test_agrees_with_dense_gradients_and_the_reference(device, dtype, kind, trials, shared):
    lists = make(trials, shared, dtype, device)
    tolerance = TOLERANCE[dtype]
    loss = factored_matching_loss(*lists, weights=WEIGHTS, kind=kind)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == (trials,)
    expected = dense_loss(lists, weights=WEIGHTS, kind=kind)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    images = torch.rand(trials, 2, 3, 4, device=device).to(dtype)
    settings = ([w / sum(WEIGHTS) for w in WEIGHTS], kind, images, 0.3, True)
    loss, sums, saved = torch.ops.r2f.factored_matching_loss(*lists, *settings)
    expected_loss, expected, expected_saved = reference.factored_matching_loss(*lists, *settings)
    scale = float(expected.abs().max())
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(sums, expected, rtol=10 * tolerance, atol=tolerance * scale)
    largest = float(expected_saved.abs().max()) if expected_saved.numel() else 0.0
    torch.testing.assert_close(saved, expected_saved, rtol=tolerance, atol=tolerance * largest)
    grad = torch.rand(trials, device=device, dtype=loss.dtype)
    inputs = (grad, *lists, expected, saved, *settings)
    got = torch.ops.r2f.factored_matching_loss_backward(*inputs)
    want = reference.factored_matching_loss_backward(*inputs)
    for ours, theirs in zip([*got[0], *got[1], got[2]], [*want[0], *want[1], want[2]], strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=10 * tolerance, atol=10 * tolerance * max(1e-3, float(theirs.abs().max()))
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_against_autograd_through_dense_gradients(device, kind, shared):
    lists = make(2, shared, torch.float64, device)
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, device=device)
    variables = [t.requires_grad_() for t in (*lists[0], *lists[1], images)]
    factor = torch.tensor([0.3, 2.0], dtype=torch.float64, device=device)
    settings = {"images": images, "weights": WEIGHTS, "kind": kind, "tv_weight": 0.7}
    loss = factored_matching_loss(*lists, **settings)
    plain = dense_loss(lists, **settings)
    torch.testing.assert_close(loss, plain)
    got, expected = (torch.autograd.grad((value * factor).sum(), variables) for value in (loss, plain))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-9 * max(1.0, float(e.abs().max())))


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives(device, kind):
    x, delta, observed = make(2, True, torch.float64, device, [(3, 4, 3), (2, 2, 5)])
    delta = [1e3 * t for t in delta]
    images = torch.rand(2, 1, 3, 2, dtype=torch.float64, device=device)
    variables = [t.requires_grad_() for t in (*x, *delta, images)]

    def function(*tensors: Tensor) -> Tensor:
        settings = {"images": tensors[4], "weights": [1.0, 2.0], "kind": kind, "tv_weight": 0.5, "isotropic": True}
        return factored_matching_loss(tensors[:2], tensors[2:4], observed, **settings)

    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables)


def test_observed_is_a_constant(device):
    lists = make(2, True, device=device)
    for t in (*lists[0], lists[2][0]):
        t.requires_grad_()
    with pytest.raises(ValueError, match="observed is a constant"):
        factored_matching_loss(*lists).sum().backward()


@pytest.mark.parametrize("scale", [1e-6, 1e-22])
def test_tiny_deltas_lose_nothing(device, scale):
    x, delta, observed = make(2, True, torch.float32, device)
    small = [(1e3 * scale * d).requires_grad_() for d in delta]
    loss = factored_matching_loss(x, small, observed)
    torch.testing.assert_close(loss, factored_matching_loss(x, delta, observed))
    grads = torch.autograd.grad(loss.sum(), small)
    assert all(torch.isfinite(g).all() for g in grads) and grads[0].any()


def test_zeros_nans_and_empty_tensors(device):
    x, delta, observed = make(2, False, device=device, shapes=[(3, 4, 5)])
    nothing = [torch.zeros_like(d).requires_grad_() for d in delta]
    loss = factored_matching_loss(x, nothing, observed)
    assert loss.tolist() == [1.0, 1.0] and not torch.autograd.grad(loss.sum(), nothing)[0].any()
    assert torch.isnan(factored_matching_loss(x, delta, [o * float("nan") for o in observed])).all()
    for shape in [(0, 4, 5), (3, 0, 5), (3, 4, 0)]:
        lists = make(2, True, device=device, shapes=[shape])
        leaf = lists[0][0].requires_grad_()
        loss = factored_matching_loss(*lists)
        assert loss.tolist() == [1.0, 1.0]
        assert not torch.autograd.grad(loss.sum(), leaf)[0].any()
    lists = make(0, True, device=device)
    assert factored_matching_loss(*lists).shape == (0,)


def test_any_strides_deterministic_and_independent_of_the_other_trials(device):
    lists = make(4, False, device=device)
    strided = [[t.mT.contiguous().mT for t in tensors] for tensors in lists]
    strided[0][0] = torch.randn(141, device=device)[1:].view(4, 5, 7).copy_(lists[0][0])  # not aligned
    loss = factored_matching_loss(*lists)
    assert torch.equal(factored_matching_loss(*lists), loss)
    torch.testing.assert_close(factored_matching_loss(*strided), loss)
    alone = factored_matching_loss(*[[t[2:3] for t in tensors] for tensors in lists])
    torch.testing.assert_close(alone, loss[2:3])


def test_gradients_follow_the_dtype_of_the_input(device):
    lists = make(2, True, torch.bfloat16, device)
    variables = [t.requires_grad_() for tensors in lists[:2] for t in tensors]
    factored_matching_loss(*lists).sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in variables)


def test_operator_rules(device):
    lists = make(2, True, device=device)
    images = torch.rand(2, 1, 4, 5, device=device)
    settings = ([0.2] * 5, "cosine", images, 0.5, False)
    op = torch.ops.r2f.factored_matching_loss.default
    torch.library.opcheck(op, (*lists, *settings))
    loss, sums, saved = op(*lists, *settings)
    inputs = (loss, *lists, sums, saved, *settings)
    torch.library.opcheck(torch.ops.r2f.factored_matching_loss_backward.default, inputs)
    for t in (*lists[0], *lists[1], images):
        t.requires_grad_()
    torch.library.opcheck(op, (*lists, *settings))


@pytest.mark.slow
def test_inside_torch_compile(device):
    x, delta, observed = make(2, True, device=device, shapes=[(3, 4, 5), (2, 3, 3)])
    variables = [t.requires_grad_() for t in (*x, *delta)]

    def loss(*tensors: Tensor) -> Tensor:
        return factored_matching_loss(tensors[:2], tensors[2:], observed).square().sum()

    expected = torch.autograd.grad(loss(*variables), variables)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*variables), variables)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_under_cuda_graph_capture():
    lists = make(2, True, device="cuda")
    variables = [t.requires_grad_() for t in (*lists[0], *lists[1])]

    def step() -> tuple[Tensor, ...]:
        loss = factored_matching_loss(*lists)
        return loss, *torch.autograd.grad(loss.sum(), variables)

    check_replay(step, lists[1][0])


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
        ({"delta": [torch.zeros(2, 3, 5).double()]}, TypeError, r"delta\[0\] must be torch.float32"),
        ({"x": [torch.zeros(2, 3, 4).half()]}, TypeError, "float16"),
        ({"delta": [torch.zeros(2, 3, 5, device="meta")]}, ValueError, "one device"),
        ({"kind": "cos"}, ValueError, "kind must be one of"),
        ({"weights": [1.0, 1.0]}, ValueError, "weights must be 1 numbers"),
        ({"images": torch.zeros(3, 1, 2, 2)}, ValueError, r"images must be \[2, c, h, w\]"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    assert factored_matching_loss(**GOOD).shape == (2,)
    with pytest.raises(error, match=words):
        factored_matching_loss(**{**GOOD, **change})
