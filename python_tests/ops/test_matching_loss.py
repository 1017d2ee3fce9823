"""matching_loss: the compiled kernels against the reference, both against the formula, and the rules of operators."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.utils.checkpoint
from graph_cases import check_replay
from torch import Tensor

from r2f_ext.ops import backend_of, build_information, reference
from r2f_ext.ops import matching_loss as matching_loss_of
from r2f_ext.ops.matching_loss import KINDS

SHAPES = [(7, 5), (33,), (2, 3, 17), (1,), (130, 129)]  # the last: more than one chunk
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6}
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 3.0]


def make(trials, shared, dtype=torch.float32, device="cpu", shapes=SHAPES) -> tuple[list[Tensor], list[Tensor]]:
    candidate = [torch.randn(trials, *shape).to(device, dtype) for shape in shapes]
    observed = [torch.randn(1 if shared else trials, *shape).to(device, dtype) for shape in shapes]
    return candidate, observed


def matching_loss(candidate, observed, images=None, **settings) -> Tensor:
    """The operator, with images without any variation unless given."""
    if images is None:
        trials = candidate[0].shape[:1] if candidate else (0,)
        images = torch.zeros(*trials, 1, 1, 1, device=candidate[0].device if candidate else None)
    return matching_loss_of(candidate, observed, images=images, **settings)


def total_variation(images: Tensor, isotropic: bool = False) -> Tensor:
    """Through the operator: the distance of equal gradients is 0 for `l2`."""
    same = [images.new_ones(len(images), 2)]
    return matching_loss_of(same, same, images=images, kind="l2", tv_weight=1.0, isotropic=isotropic)


def cosine_of(x: Tensor, y: Tensor) -> Tensor:
    return torch.cosine_similarity(x, y, dim=0, eps=1e-300)  # no floor: gradients may be that small


def by_definition(candidate, observed, weights, kind) -> Tensor:
    """In float64, trial by trial, from the docstring."""
    weights = [w / sum(weights) for w in weights]
    losses = []
    for t in range(len(candidate[0])):
        c = [x[t].double().flatten() for x in candidate]
        o = [x[t if len(x) > 1 else 0].double().flatten() for x in observed]
        if kind == "l2":
            terms = [w * (x - y).square().sum() for w, x, y in zip(weights, c, o, strict=True)]
        elif kind == "layer_cosine":
            terms = [w * (1 - cosine_of(x, y)) for w, x, y in zip(weights, c, o, strict=True)]
        else:
            x, y = (torch.cat([w**0.5 * v for w, v in zip(weights, vs, strict=True)]) for vs in (c, o))
            terms = [1 - cosine_of(x, y)]
        losses.append(sum(terms))
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trials", "shared"), [(1, True), (1, False), (3, True), (3, False)])
def test_agrees_with_the_definition_and_the_reference(device, dtype, kind, trials, shared):
    candidate, observed = make(trials, shared, dtype, device)
    loss = matching_loss(candidate, observed, weights=WEIGHTS, kind=kind)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == (trials,)
    expected = by_definition(candidate, observed, WEIGHTS, kind)
    torch.testing.assert_close(loss.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    images = torch.rand(trials, 2, 3, 4, device=device).to(dtype)
    for weights in (WEIGHTS, None):
        normalized = [w / sum(weights) for w in weights] if weights else [1 / len(SHAPES)] * len(SHAPES)
        settings = (normalized, kind, images, 0.3, False)
        loss, sums, grads, grad_images = torch.ops.r2f.matching_loss(candidate, observed, *settings, True)
        expected, expected_sums, expected_grads, expected_images = reference.matching_loss(
            candidate, observed, *settings, True
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(sums, expected_sums, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
        pairs = list(zip([*grads, grad_images], [*expected_grads, expected_images], strict=True))
        grad = torch.rand(trials, device=device, dtype=loss.dtype)
        got, got_images = torch.ops.r2f.matching_loss_backward(grad, candidate, observed, sums, *settings)
        want, want_images = reference.matching_loss_backward(grad, candidate, observed, sums, *settings)
        for ours, theirs in pairs + list(zip([*got, got_images], [*want, want_images], strict=True)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        alone, sums_alone, none, empty = torch.ops.r2f.matching_loss(candidate, observed, *settings, False)
        torch.testing.assert_close(alone, loss)
        assert torch.equal(sums_alone, sums) and none == [] and empty.numel() == 0


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_against_autograd_of_the_formula(device, kind, shared, isotropic):
    candidate, observed = make(2, shared, torch.float64, device)
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, device=device)
    variables = [t.requires_grad_() for t in (*candidate, images)]
    factor = torch.tensor([0.3, 2.0], dtype=torch.float64, device=device)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((loss * factor).sum(), variables)

    loss = matching_loss(
        candidate, observed, weights=WEIGHTS, kind=kind, images=images, tv_weight=0.7, isotropic=isotropic
    )
    plain = by_definition(candidate, observed, WEIGHTS, kind) + 0.7 * reference.total_variation(images, isotropic)
    torch.testing.assert_close(loss, plain)
    for got, expected in zip(gradients(loss), gradients(plain), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_first_and_second_derivatives(device, kind, shared):
    candidate, observed = make(2, shared, torch.float64, device, [(3, 2), (4,)])
    images = torch.rand(2, 1, 3, 4, dtype=torch.float64, device=device)
    variables = [t.requires_grad_() for t in (*candidate, images)]

    def function(*tensors: Tensor) -> Tensor:
        settings = {"weights": [1.0, 2.0], "kind": kind, "tv_weight": 0.5, "isotropic": True}
        return matching_loss(tensors[:2], observed, images=tensors[2], **settings)

    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables)


@pytest.mark.parametrize("scale", [1e-8, 1e-22])
def test_tiny_gradients_lose_nothing(device, scale):
    candidate, observed = make(2, True, torch.float32, device)
    for kind in ("layer_cosine", "cosine"):
        small_c, small_o = ([scale * t for t in tensors] for tensors in (candidate, observed))
        small_c[0].requires_grad_()
        loss = matching_loss(small_c, small_o, kind=kind)
        torch.testing.assert_close(loss, matching_loss(candidate, observed, kind=kind), rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(loss.sum(), small_c[0])
        assert torch.isfinite(grad).all() and grad.any()
    near = [o.expand(2, *o.shape[1:]) * (1 + 1e-6) for o in observed]
    expected = by_definition(near, observed, [1.0] * 5, "l2")
    torch.testing.assert_close(matching_loss(near, observed, kind="l2").double(), expected, rtol=1e-5, atol=0)


def test_sizes_that_float32_sums_cannot_hold():
    """In one layer, tiny, huge and ordinary blocks of elements: the CPU's kernel sums those in float64."""
    candidate, observed = make(2, True, torch.float32, shapes=[(4096,), (2048,)])
    for tensors in (candidate, observed):
        tensors[0][:, 1024:2048] *= 1e18
        tensors[0][:, 2048:3072] *= 1e-25
        tensors[0][:, 3072:] = 0
        tensors[1] *= 1e-24
    candidate[0].requires_grad_()
    for kind in ("layer_cosine", "cosine"):
        loss = matching_loss(candidate, observed, kind=kind)
        expected = by_definition(candidate, observed, [1.0, 1.0], kind)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        got, want = (torch.autograd.grad(value.sum(), candidate[0])[0] for value in (loss, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-24)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_norm_zero(device, kind):
    candidate, observed = make(2, False, torch.float64, device, [(3,), (4,)])
    candidate = [torch.zeros_like(c).requires_grad_() for c in candidate]
    loss = matching_loss(candidate, observed, kind=kind)
    grads = torch.autograd.grad(loss.sum(), candidate, create_graph=True)
    assert all(torch.isfinite(g).all() for g in grads)
    if kind != "l2":
        assert loss.tolist() == [1.0, 1.0] and not any(g.any() for g in grads)
    nan = [torch.full_like(o, float("nan")) for o in observed]
    assert torch.isnan(matching_loss(candidate, nan, kind=kind)).all()


def test_empty_and_odd_shapes(device):
    empty = [torch.zeros(0, 3, device=device)]
    assert matching_loss(empty, empty).shape == (0,)
    assert matching_loss([torch.zeros(2, 0, device=device)], [torch.zeros(1, 0, device=device)]).tolist() == [1.0, 1.0]
    scalars = torch.tensor([2.0, -3.0], device=device, requires_grad=True)
    loss = matching_loss([scalars], [torch.ones(1, device=device)], kind="l2")
    assert loss.tolist() == [1.0, 16.0]
    assert torch.autograd.grad(loss.sum(), scalars)[0].tolist() == [2.0, -8.0]


def test_any_strides(device):
    candidate, observed = make(3, False, torch.float32, device, [(6, 10), (5, 8)])
    images = torch.rand(3, 2, 6, 7, device=device)
    strided_c, strided_o = ([t.mT.contiguous().mT for t in tensors] for tensors in (candidate, observed))
    strided_c[0] = torch.randn(181, device=device)[1:].view(3, 6, 10).copy_(candidate[0])  # not aligned
    strided_images = images.to(memory_format=torch.channels_last)
    variables = [t.requires_grad_() for t in (*candidate, images, *strided_c, strided_images)]
    loss = matching_loss(candidate, observed, images=images, tv_weight=0.5)
    strided = matching_loss(strided_c, strided_o, images=strided_images, tv_weight=0.5)
    torch.testing.assert_close(strided, loss)
    for got, expected in zip(
        torch.autograd.grad(strided.sum(), variables[3:]), torch.autograd.grad(loss.sum(), variables[:3]), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_deterministic_and_independent_of_the_other_trials(device):
    candidate, observed = make(4, True, torch.float32, device)
    first, again = matching_loss(candidate, observed), matching_loss(candidate, observed)
    assert torch.equal(first, again)
    if backend_of("matching_loss", device.type) != "reference":
        assert torch.equal(matching_loss([c[2:3] for c in candidate], observed), first[2:3])


def test_gradients_follow_the_dtype_of_the_input(device):
    candidate, observed = make(2, True, torch.bfloat16, device)
    images = torch.rand(2, 3, 4, 5, device=device).requires_grad_()
    variables = [t.requires_grad_() for t in candidate]
    matching_loss(candidate, observed, images=images, tv_weight=1.0).sum().backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in variables)
    torch.testing.assert_close(images.grad, torch.autograd.grad(total_variation(images).sum(), images)[0])


ONE_PASS_SHAPES = [(7, 5), (131_073,), (90_000,), (1,)]  # in one pass: all but the second (`kOnePass`)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_from_the_forward_equal_those_from_the_backward(device, dtype, kind, shared):
    """On the CPU, the forward computes the gradients; the backward returns them if all losses have gradient 1."""
    candidate, observed = make(3, shared, dtype, device, ONE_PASS_SHAPES)
    images = torch.rand(3, 2, 5, 6, device=device, dtype=dtype)
    variables = [t.requires_grad_() for t in (*candidate, images)]
    settings = {"weights": [1.0, 0.5, 2.0, 0.0], "kind": kind, "images": images, "tv_weight": 0.3}
    expected = torch.autograd.grad((2 * matching_loss(candidate, observed, **settings)).sum(), variables)
    got = torch.autograd.grad(matching_loss(candidate, observed, **settings).sum(), variables)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs / 2)


def test_backward_twice_through_one_graph(device):
    """A change of the first gradients in place does not change the second ones."""
    candidate, observed = make(2, True, torch.float32, device)
    for c in candidate:
        c.requires_grad_()
    loss = matching_loss(candidate, observed, kind="l2").sum()
    first = torch.autograd.grad(loss, candidate, retain_graph=True)
    copies = [g.clone() for g in first]
    for g in first:
        g.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, candidate), tuple(copies))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (torch.utils._python_dispatch, "_get_current_dispatch_mode"),
        (torch._C._autograd, "_get_current_graph_task_keep_graph"),
    ],
)
def test_without_a_private_function_of_torch_nothing_is_reused(monkeypatch, module, name):
    candidate, observed = make(2, True, torch.float64)
    variables = [c.requires_grad_() for c in candidate]
    expected = torch.autograd.grad(matching_loss(candidate, observed, kind="l2").sum(), variables)
    operator = importlib.import_module("r2f_ext.ops.matching_loss")
    monkeypatch.delattr(module, name)
    assert not operator._can_reuse(torch.ones(2))
    torch.testing.assert_close(
        torch.autograd.grad(matching_loss(candidate, observed, kind="l2").sum(), variables), expected
    )


@pytest.mark.parametrize("part", ["some candidates", "images"])
def test_gradients_of_a_part(device, part):
    candidate, observed = make(2, True, torch.float64, device)
    images = torch.rand(2, 1, 4, 5, device=device, dtype=torch.float64)
    parts = {"some candidates": candidate[1:3], "images": [images]}
    variables = [t.requires_grad_() for t in parts[part]]
    got = torch.autograd.grad(matching_loss(candidate, observed, images=images, tv_weight=0.3).sum(), variables)
    plain = by_definition(candidate, observed, [1.0] * 5, "layer_cosine") + 0.3 * reference.total_variation(
        images, False
    )
    torch.testing.assert_close(got, torch.autograd.grad(plain.sum(), variables))


def test_the_raw_operator_differentiates(device):
    candidate, observed = make(2, True, torch.float64, device)
    images = torch.rand(2, 1, 4, 5, device=device, dtype=torch.float64)
    variables = [t.requires_grad_() for t in (*candidate, images)]
    expected = torch.autograd.grad(matching_loss(candidate, observed, images=images, tv_weight=0.3).sum(), variables)
    for with_gradients in (False, True):
        settings = ([0.2] * 5, "layer_cosine", images, 0.3, False, with_gradients)
        loss, sums, grads, grad_images = torch.ops.r2f.matching_loss(candidate, observed, *settings)
        assert loss.requires_grad and not any(t.requires_grad for t in (sums, *grads, grad_images))
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), variables), expected)


def test_observed_is_a_constant(device):
    candidate, observed = make(2, True, torch.float32, device)
    loss = matching_loss([c.requires_grad_() for c in candidate], [o.requires_grad_() for o in observed])
    with pytest.raises(ValueError, match="observed is a constant"):
        loss.sum().backward()


def test_lazy_signs_are_seen(device):
    """The imaginary part of a conjugate is a view with a sign that no memory has yet."""
    lazy = [torch.randn(1, 4, dtype=torch.complex128, device=device).conj().imag for _ in range(2)]
    upstream = torch.randn(2, dtype=torch.complex128, device=device).conj().imag
    candidate = [torch.randn(2, 4, dtype=torch.float64, device=device).requires_grad_() for _ in range(2)]
    for observed, to_loss in ((lazy, torch.ones_like(upstream)), ([o.resolve_neg() for o in lazy], upstream)):
        loss = matching_loss(candidate, observed, kind="l2")
        plain = by_definition(candidate, [o.resolve_neg() for o in observed], [1.0] * 2, "l2")
        torch.testing.assert_close(loss, plain)
        got, want = (torch.autograd.grad(value, candidate, to_loss) for value in (loss, plain))
        torch.testing.assert_close(got, want)


class Wrapped(torch.Tensor):
    """A tensor without memory of its own: operators reach the one inside through `__torch_dispatch__`."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)

    def __init__(self, inside: Tensor):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inside if isinstance(value, Wrapped) else value

        return function(*torch.utils._pytree.tree_map(unwrap, args), **(kwargs or {}))


def test_subclasses_go_through_the_dispatcher(device):
    candidate, observed = make(2, True, device=device, shapes=[(3, 4), (5,)])
    images = torch.rand(2, 1, 4, 5, device=device)
    for c in candidate:
        c.requires_grad_()
    expected = matching_loss(candidate, observed, images=images, tv_weight=0.1)
    for o, i in (([Wrapped(observed[0]), observed[1]], images), (observed, Wrapped(images))):
        torch.testing.assert_close(matching_loss(candidate, o, images=i, tv_weight=0.1), expected)


def test_no_trials(device):
    candidate = torch.zeros(0, 3, device=device).requires_grad_()
    loss = matching_loss([candidate], [torch.ones(1, 3, device=device)], kind="l2")
    assert torch.autograd.grad(loss.sum(), candidate)[0].shape == (0, 3)


def test_a_freed_graph_is_an_error(device):
    candidate, observed = make(2, True, torch.float32, device)
    loss = matching_loss([c.requires_grad_() for c in candidate], observed).sum()
    torch.autograd.grad(loss, candidate)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, candidate)
    with torch.no_grad():
        changed = matching_loss(candidate, observed).sum()
    loss = matching_loss(candidate, observed).sum()
    torch.testing.assert_close(loss, changed)
    with torch.no_grad():
        candidate[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, candidate)


def test_gradients_beyond_the_caches(device):
    """Results of more than `kCaches` bytes go through non-temporal stores; the second trial's row is not aligned."""
    candidate, observed = make(2, True, torch.float32, device, [((1 << 20) + 1,)])
    candidate[0].requires_grad_()
    for kind, factor in (("l2", 1.0), ("l2", 0.5), ("cosine", 1.0)):
        (got,) = torch.autograd.grad(factor * matching_loss(candidate, observed, kind=kind).sum(), candidate)
        (want,) = torch.autograd.grad(factor * by_definition(candidate, observed, [1.0], kind).sum(), candidate)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_operator_rules(device, with_gradients):
    candidate, observed = make(2, True, device=device)
    images = torch.rand(2, 1, 4, 5, device=device)
    settings = ([0.2] * 5, "cosine", images, 0.5, False)
    op = torch.ops.r2f.matching_loss.default
    torch.library.opcheck(op, (candidate, observed, *settings, with_gradients))
    loss, sums, *_ = op(candidate, observed, *settings, False)
    torch.library.opcheck(torch.ops.r2f.matching_loss_backward.default, (loss, candidate, observed, sums, *settings))
    images.requires_grad_()
    torch.library.opcheck(op, ([c.requires_grad_() for c in candidate], observed, *settings, with_gradients))


@pytest.mark.slow
def test_inside_torch_compile(device):
    candidate, observed = make(2, True, device=device, shapes=[(3, 4), (5,)])
    images = torch.rand(2, 1, 4, 5, device=device)
    variables = [t.requires_grad_() for t in (*candidate, images)]

    def loss(*tensors: Tensor) -> Tensor:
        return matching_loss(tensors[:2], observed, images=tensors[2], tv_weight=0.1).square().sum()

    expected = torch.autograd.grad(loss(*variables), variables)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*variables), variables)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_under_cuda_graph_capture():
    candidate, observed = make(2, True, device="cuda")
    images = torch.rand(2, 3, 8, 9, device="cuda")
    variables = [t.requires_grad_() for t in (*candidate, images)]

    def step() -> tuple[Tensor, ...]:
        loss = matching_loss(candidate, observed, images=images, tv_weight=0.1)
        return loss, *torch.autograd.grad(loss.sum(), variables)

    check_replay(step, candidate[0])


GOOD = {"candidate": [torch.zeros(2, 3), torch.zeros(2, 4, 5)], "observed": [torch.zeros(2, 3), torch.zeros(1, 4, 5)]}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"candidate": []}, ValueError, "same length"),
        ({"observed": GOOD["observed"][:1]}, ValueError, "same length"),
        ({"candidate": [torch.zeros(2, 3), torch.zeros(3, 4, 5)]}, ValueError, r"candidate must be tensors \[T"),
        ({"observed": [torch.zeros(2, 4), torch.zeros(1, 4, 5)]}, ValueError, "observed of the same shapes"),
        ({"candidate": [torch.zeros(()), torch.zeros(2, 4, 5)]}, ValueError, r"candidate must be tensors \[T"),
        (
            {"observed": [torch.zeros(2, 3).double(), torch.zeros(1, 4, 5)]},
            TypeError,
            r"observed\[0\] must be torch.float32",
        ),
        ({"candidate": [torch.zeros(2, 3).half(), torch.zeros(2, 4, 5)]}, TypeError, "float16"),
        ({"observed": [torch.zeros(2, 3, device="meta"), torch.zeros(1, 4, 5)]}, ValueError, "one device"),
        ({"kind": "cos"}, ValueError, "kind must be one of"),
        ({"weights": [1.0]}, ValueError, "weights must be 2 numbers"),
        ({"weights": [0.0, 0.0]}, ValueError, "not all zero"),
        ({"weights": [2.0, -1.0]}, ValueError, ">= 0"),
        ({"images": torch.zeros(3, 1, 2, 2)}, ValueError, r"images must be \[2, c, h, w\]"),
        ({"images": torch.zeros(2, 1, 2, 2).half()}, TypeError, "images must be float32"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    call = {**GOOD, **change}
    with pytest.raises(error, match=words):
        matching_loss(call.pop("candidate"), call.pop("observed"), **call)


@pytest.mark.skipif(not build_information()["loaded"], reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree(isa):
    code = (
        "import torch; from r2f_ext.ops import reference; torch.manual_seed(0); op = torch.ops.r2f;"
        "c = [torch.randn(2, n) for n in (1, 37, 16390)]; o = [torch.randn(1, n) for n in (1, 37, 16390)];"
        "s = ([1 / 3] * 3, 'layer_cosine', torch.rand(2, 3, 5, 37), .5, True);"
        "got = op.matching_loss(c, o, *s, True); want = reference.matching_loss(c, o, *s, True); g = torch.ones(2);"
        "a = op.matching_loss_backward(g, c, o, want[1], *s);"
        "b = reference.matching_loss_backward(g, c, o, want[1], *s);"
        "flat = lambda *r: [t for x in r for t in (x if isinstance(x, list) else [x])];"
        "pairs = zip(flat(*got, *a), flat(*want, *b), strict=True);"
        "print(all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in pairs))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "R2F_CPU_ISA": isa}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip() == "True"


# ---- The total variation of the images ------------------------------------------------------------------------------

IMAGE_SHAPES = [(2, 3, 6, 5), (1, 1, 1, 1), (3, 1, 1, 7), (2, 2, 9, 1), (2, 1, 34, 67), (0, 3, 4, 4), (2, 0, 4, 4)]
IMAGE_SHAPES += [(2, 3, 0, 4), (2, 3, 4, 0), (1, 2, 2, 2), (2, 2, 5, 16), (2, 1, 4, 31)]
IMAGE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}


def variation_by_definition(images: Tensor, isotropic: bool) -> Tensor:
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
@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
def test_variation_agrees_with_the_definition_and_the_reference(device, shape, isotropic):
    for dtype, tolerance in IMAGE_TOLERANCE.items():
        images = torch.randn(shape).to(device, dtype).requires_grad_()
        value = total_variation(images, isotropic)
        assert value.shape == shape[:1]
        if images[0:1].numel() < 100:
            expected = variation_by_definition(images.detach(), isotropic)
            torch.testing.assert_close(value.detach().double().cpu(), expected, rtol=tolerance, atol=tolerance)
        plain = reference.total_variation(images, isotropic)
        torch.testing.assert_close(value, plain.to(value.dtype), rtol=tolerance, atol=tolerance)
        factors = torch.rand(shape[0], device=device)
        (got,) = torch.autograd.grad((value * factors).sum(), images)
        expected = reference.total_variation_backward(factors, images.detach(), isotropic).to(dtype)
        rtol = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(got, expected, rtol=rtol, atol=max(tolerance, 1e-7))


def test_variation_by_hand(device):
    image = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]], device=device)
    # rows: |2-0|, |2-1|, |2-3| -> mean 4/3; columns: 1, 2, 0, 0 -> mean 3/4
    images = torch.stack([image, torch.ones(1, 2, 3, device=device)])
    assert total_variation(images).tolist() == pytest.approx([4 / 3 + 3 / 4, 0.0])


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (1, 1, 1, 1), (1, 2, 1, 4), (1, 1, 3, 1)], ids=str)
def test_variation_first_and_second_derivatives(device, shape, isotropic):
    images = torch.rand(shape, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: total_variation(x, isotropic), images)
    assert torch.autograd.gradgradcheck(lambda x: total_variation(x, isotropic), images)


def test_flat_images_have_no_gradient(device):
    images = torch.full((2, 3, 7, 9), 0.4, device=device).requires_grad_()
    for isotropic in (False, True):
        value = total_variation(images, isotropic)
        assert value.abs().max() < 2e-6
        assert not torch.autograd.grad(value.sum(), images)[0].any()


def test_images_of_any_strides_and_dtypes(device):
    images = torch.rand(2, 3, 20, 21, device=device)
    strided = images.to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(total_variation(strided), total_variation(images))
    half = images.bfloat16().requires_grad_()
    assert torch.autograd.grad(total_variation(half).sum(), half)[0].dtype == torch.bfloat16


def test_under_activation_checkpointing(device):
    """Checkpointing unpacks each saved tensor once."""
    candidate, observed = make(2, False, device=device)
    images, leaf = torch.rand(2, 1, 4, 4, device=device), candidate[0].clone().requires_grad_()

    def loss(first: Tensor) -> Tensor:
        return matching_loss([first * 2, *candidate[1:]], observed, images).sum()

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, expected)
