"""lora_grad: the compiled kernels against the reference, both against autograd, and the rules every operator keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from r2f_ext.env import environment
from r2f_ext.ops import LoraGrad, backend_of, build_information, lora_grad, reference

RANKS = [1, 2, 3, 8, 16, 33, 64]
SHAPES = [(3, 5, 33, 17), (2, 49, 16, 130), (4, 65, 128, 96), (1, 1, 1, 1), (1, 26, 1030, 7)]  # P, N, d_in, d_out
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 1e-5,
}  # bfloat16 is summed in float32


def make(shape, rank, dtype=torch.float32, device="cpu", A_per_group=False, B="none") -> list[Tensor | None]:
    P, N, d_in, d_out = shape
    x, delta = torch.randn(P, N, d_in), torch.randn(P, N, d_out)
    A = torch.randn(P, rank, d_in) if A_per_group else torch.randn(rank, d_in)
    factors = {"none": None, "shared": torch.randn(d_out, rank), "per group": torch.randn(P, d_out, rank)}
    return [None if t is None else t.to(device, dtype) for t in (x, delta, A, factors[B])]


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.shape == expected.shape
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance * max(size, 1.0))


def by_definition(x, delta, A, B, scale, lr) -> LoraGrad:
    """From the dense G, in float64."""
    x, delta, A = x.double(), delta.double(), A.double()
    G = delta.mT @ x
    B = x.new_zeros(delta.shape[2], A.shape[-2]) if B is None else B.double()
    grad_A, grad_B = scale * (B.mT @ G), scale * (G @ A.mT)
    return LoraGrad(grad_A, grad_B, A - lr * grad_A, B - lr * grad_B)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("B", ["none", "shared", "per group"])
def test_agrees_with_the_definition_and_the_reference(device, dtype, rank, B):
    for shape in SHAPES:
        x, delta, A, B0 = make(shape, rank, dtype, device, A_per_group=B == "per group", B=B)
        result = lora_grad(x, delta, A, B0, scale=0.5, lr=0.1)
        for got, expected in zip(result, by_definition(x, delta, A, B0, 0.5, 0.1), strict=True):
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(got, expected, TOLERANCE[dtype])
        raw = torch.ops.r2f.lora_grad(x, delta, A, B0, 0.5, 0.1)
        for got, expected in zip(raw, reference.lora_grad(x, delta, A, B0, 0.5, 0.1), strict=True):
            assert_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("tokens", "width"), [(48, 512), (49, 512), (100, 512), (30, 3072)])
@pytest.mark.parametrize("rank", [1, 2, 12, 15, 16, 24])
def test_groups_on_both_sides_of_what_is_streamed(device, tokens, width, rank):
    """On the CPU groups of more than 192 KB are taken in short runs of rows."""
    for B in ("none", "shared"):
        x, delta, A, B0 = make((3, tokens, width, width), rank, device=device, A_per_group=B == "none", B=B)
        assert (x[0].nbytes + delta[0].nbytes > 192 << 10) == (tokens != 48)
        result = lora_grad(x, delta, A, B0, scale=0.5, lr=0.1)
        for got, expected in zip(result, by_definition(x, delta, A, B0, 0.5, 0.1), strict=True):
            assert_close(got, expected, TOLERANCE[torch.float32])


ROWS = [3, 0, 17, 1, 30, 0]  # of groups of unequal size


def make_ragged(rows, rank, dtype=torch.float32, device="cpu", A_per_group=False, B="none", d_in=33, d_out=20):
    """Inputs, and their offsets."""
    x, delta, A, B0 = make((len(rows), 1, d_in, d_out), rank, dtype, device, A_per_group, B)
    x, delta = (torch.randn(sum(rows), d, device=device).to(dtype) for d in (d_in, d_out))
    return x, delta, A, B0, torch.tensor([0, *rows], device=device).cumsum(0)


def group_by_group(x, delta, A, B, offsets, **options) -> list[Tensor]:
    """Ragged results from one call for each group."""
    parts = []
    for p in range(len(offsets) - 1):
        a, b = offsets[p], offsets[p + 1]
        A_p, B_p = (None if f is None else f if f.ndim == 2 else f[p : p + 1] for f in (A, B))
        parts.append(lora_grad(x[None, a:b], delta[None, a:b], A_p, B_p, **options))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("B", ["none", "shared", "per group"])
@pytest.mark.parametrize("A_per_group", [False, True])
def test_groups_of_unequal_size(device, dtype, B, A_per_group):
    for rows, rank in [(ROWS, 3), (ROWS, 8), ([700], 8), ([5, 300, 2], 17), ([0, 0], 2), ([0], 1), ([1] * 40, 4)]:
        x, delta, A, B0, offsets = make_ragged(rows, rank, dtype, device, A_per_group, B)
        result = lora_grad(x, delta, A, B0, scale=0.5, lr=0.1, offsets=offsets)
        for got, expected in zip(result, group_by_group(x, delta, A, B0, offsets, scale=0.5, lr=0.1), strict=True):
            assert_close(got, expected, TOLERANCE[dtype])
        raw = torch.ops.r2f.lora_grad(x, delta, A, B0, 0.5, 0.1, offsets)
        for got, expected in zip(raw, reference.lora_grad(x, delta, A, B0, 0.5, 0.1, offsets), strict=True):
            assert_close(got, expected, TOLERANCE[dtype])


def test_equal_groups_by_offsets_are_the_same_sums(device):
    x, delta, A, B = make((4, 7, 20, 12), 5, device=device, B="shared")
    offsets = torch.arange(5, device=device) * 7
    expected = lora_grad(x, delta, A, B, scale=1.0, lr=0.5)
    for got, want in zip(lora_grad(x.flatten(0, 1), delta.flatten(0, 1), A, B, scale=1.0, lr=0.5, offsets=offsets),
                         expected, strict=True):  # fmt: skip
        assert_close(got, want, 1e-6)


def test_no_groups_at_all(device):
    x, delta, A, B, offsets = make_ragged([], 2, device=device, A_per_group=True, B="per group")
    result = lora_grad(x, delta, A, B, scale=1.0, lr=0.1, offsets=offsets)
    assert [tuple(t.shape) for t in result] == [(0, 2, 33), (0, 20, 2)] * 2


@pytest.mark.parametrize("B", ["none", "shared", "per group"])
def test_derivatives_of_groups_of_unequal_size(device, B):
    *inputs, offsets = make_ragged([2, 0, 3, 1], 2, torch.float64, device, B == "per group", B, d_in=4, d_out=3)
    variables = [t.requires_grad_() for t in inputs if t is not None]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = lora_grad(*tensors, scale=0.7, lr=0.3, offsets=offsets)
        return tuple(result) if B != "none" else (result.grad_B, result.A1, result.B1)

    assert torch.autograd.gradcheck(step, variables)
    assert torch.autograd.gradgradcheck(step, variables)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4, 3], [0, -1, 3]])
def test_offsets_out_of_order(offsets):
    x, delta, A, _ = make((1, 3, 4, 5), 2)
    with pytest.raises(ValueError, match="offsets must start at 0, never decrease, and end at the 3 rows"):
        lora_grad(x[0], delta[0], A, scale=1.0, offsets=torch.tensor(offsets))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offsets_out_of_order_are_cut_to_rows_that_exist():
    x, delta, A, _ = make((1, 3, 4, 5), 2, device="cuda")
    for offsets in ([0, 2, 9], [-4, 2, 3], [3, 0, 3]):
        lora_grad(x[0], delta[0], A, scale=1.0, offsets=torch.tensor(offsets, device="cuda"))
    torch.cuda.synchronize()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ragged", [False, True])
def test_inside_a_cuda_graph(ragged):
    x, delta, A, B, offsets = make_ragged([4, 4, 4] if not ragged else ROWS, 3, device="cuda", B="shared")
    if not ragged:
        x, delta, offsets = x.view(3, 4, -1), delta.view(3, 4, -1), None
    expected = lora_grad(x, delta, A, B, scale=0.5, lr=0.1, offsets=offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = lora_grad(x, delta, A, B, scale=0.5, lr=0.1, offsets=offsets)
    graph.replay()
    for got, want in zip(result, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("start_at_zero", [True, False])
def test_agrees_with_autograd_of_an_adapted_linear_layer(device, start_at_zero):
    P, N, d_in, d_out, rank, scale, lr = 3, 10, 24, 18, 4, 2.0, 0.1
    layer = torch.nn.Linear(d_in, d_out, dtype=torch.float64, device=device)
    x, _, A, B = make((P, N, d_in, d_out), rank, torch.float64, device, B="shared")
    B = torch.zeros_like(B) if start_at_zero else B
    A, B, targets = A.requires_grad_(), B.requires_grad_(), torch.randn(P, N, d_out, dtype=torch.float64, device=device)
    deltas, expected = [], []
    for p in range(P):
        y = layer(x[p]) + scale * (x[p] @ A.T) @ B.T
        loss = torch.nn.functional.mse_loss(torch.tanh(y), targets[p])
        *grads, delta = torch.autograd.grad(loss, [A, B, y])
        deltas.append(delta)
        expected.append(grads)
    result = lora_grad(x, torch.stack(deltas), A.detach(), None if start_at_zero else B.detach(), scale=scale, lr=lr)
    for p in range(P):
        torch.testing.assert_close(result.grad_A[p], expected[p][0])
        torch.testing.assert_close(result.grad_B[p], expected[p][1])
        torch.testing.assert_close(result.A1[p], A.detach() - lr * expected[p][0])
        torch.testing.assert_close(result.B1[p], B.detach() - lr * expected[p][1])


def test_without_a_step_there_are_no_stepped_factors(device):
    x, delta, A, B = make((2, 3, 4, 5), 2, device=device, B="shared")
    for factor in (None, B):
        result = lora_grad(x, delta, A, factor, scale=1.0)
        assert result.A1 is None and result.B1 is None
        assert result.grad_A.shape == (2, 2, 4) and result.grad_B.shape == (2, 5, 2)


def test_a_result_does_not_change_with_the_callers_tensors():
    x, delta, A, _ = make((2, 3, 4, 5), 2)
    before = A.clone()
    result = lora_grad(x, delta, A, scale=1.0, lr=0.1)
    A.zero_()
    assert torch.equal(result.A1[0], before)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("B", ["none", "shared", "per group"])
def test_empty_inputs_give_zeros(device, shape, B):
    x, delta, A, B0 = make(shape, 2, device=device, B=B)
    result = lora_grad(x, delta, A, B0, scale=1.0, lr=0.5)
    P, _, d_in, d_out = shape
    assert result.grad_A.shape == result.A1.shape == (P, 2, d_in)
    assert result.grad_B.shape == result.B1.shape == (P, d_out, 2)
    assert not result.grad_A.any() and not result.grad_B.any()
    assert torch.equal(result.A1, A.expand(P, 2, d_in))


def test_any_strides(device):
    x, delta, A, B = make((3, 6, 20, 14), 4, device=device, A_per_group=True, B="per group")
    strided = [t.mT.contiguous().mT for t in (x, delta, A)] + [B.repeat(1, 2, 1)[:, ::2].contiguous().flip(1)]
    expected = lora_grad(x, delta, A, strided[3].contiguous(), scale=1.0, lr=0.1)
    for got, want in zip(lora_grad(*strided, scale=1.0, lr=0.1), expected, strict=True):
        assert_close(got, want, 1e-6)
    unaligned = torch.randn(3 * 6 * 20 + 1, device=device)[1:].view(3, 6, 20)
    want = by_definition(unaligned, delta, A, B, 1.0, 0.1)
    assert_close(lora_grad(unaligned, delta, A, B, scale=1.0).grad_B, want.grad_B, 1e-5)


def test_deterministic_and_independent_of_the_other_groups(device):
    x, delta, A, B = make((6, 70, 96, 40), 8, device=device, B="shared")
    first, again = (lora_grad(x, delta, A, B, scale=1.0) for _ in range(2))
    alone = lora_grad(x[3:4], delta[3:4], A, B, scale=1.0)
    assert torch.equal(first.grad_A, again.grad_A) and torch.equal(first.grad_B, again.grad_B)
    if backend_of("lora_grad", device.type) != "reference":
        assert torch.equal(first.grad_B[3], alone.grad_B[0])


@pytest.mark.parametrize("B", ["none", "shared", "per group"])
def test_first_and_second_derivatives(device, B):
    inputs = make((2, 3, 4, 3), 2, torch.float64, device, A_per_group=B == "per group", B=B)
    variables = [t.requires_grad_() for t in inputs if t is not None]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = lora_grad(*tensors, scale=0.7, lr=0.3)
        return tuple(result) if B != "none" else (result.grad_B, result.A1, result.B1)

    def no_step(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = lora_grad(*tensors, scale=0.7)
        return (result.grad_A, result.grad_B) if B != "none" else (result.grad_B,)

    for function in (step, no_step):
        assert torch.autograd.gradcheck(function, variables)
        assert torch.autograd.gradgradcheck(function, variables)


def test_gradients_follow_the_dtype_of_the_input():
    x, delta, A, B = (t.requires_grad_() for t in make((2, 3, 4, 5), 2, torch.bfloat16, B="shared"))
    sum(t.sum() for t in lora_grad(x, delta, A, B, scale=1.0, lr=0.1)).backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in (x, delta, A, B))


@pytest.mark.parametrize("B", ["none", "per group"])
@pytest.mark.parametrize("lr", [None, 0.1])
def test_operator_rules(device, B, lr):
    inputs = make((2, 5, 6, 7), 3, device=device, B=B)
    torch.library.opcheck(torch.ops.r2f.lora_grad.default, (*inputs, 0.5, lr))
    *inputs, offsets = make_ragged([2, 0, 3], 3, device=device, B=B)
    torch.library.opcheck(torch.ops.r2f.lora_grad.default, (*inputs, 0.5, lr, offsets))


def test_under_transforms(device):
    """vmap, with and without gradients beyond it, torch.func.grad; forward mode is refused, not dropped."""
    x, delta, A, _ = make((5, 3, 4, 6), 2, torch.float64, device)
    xs = torch.stack([x, 2 * x]).requires_grad_()

    def of(t):
        return lora_grad(t, delta, A, scale=0.5).grad_B

    expected = torch.stack([of(t) for t in xs])
    got = torch.vmap(of)(xs)
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), xs) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(of)(xs), expected)
    slope = torch.func.grad(lambda t: of(t).square().sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(of(leaf).square().sum(), leaf)[0])
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(of, (x,), (x,))


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
def test_inside_torch_compile(device, ragged):
    x, delta, A, B = make((2, 5, 6, 7), 3, device=device, B="shared")
    offsets = torch.tensor([0, 4, 5], device=device) if ragged else None
    x, delta = (x[0], delta[0]) if ragged else (x, delta)
    x.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return lora_grad(x, delta, A, B, scale=0.5, lr=0.1, offsets=offsets).B1.square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


FLAT = {"x": torch.zeros(6, 4), "delta": torch.zeros(6, 5)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \[P, N, d_in\]"),
        ({"delta": torch.zeros(2, 4, 5)}, ValueError, "same P and N"),
        ({"A": torch.zeros(2, 9)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(3, 2, 4)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(0, 4)}, ValueError, "rank must be at least 1"),
        ({"B": torch.zeros(2, 5)}, ValueError, r"B must be \[d_out, r\]"),
        ({"A": torch.zeros(2, 4).double()}, TypeError, "one dtype.*float32, float32, float64"),
        ({"x": torch.zeros(2, 3, 4).half()}, TypeError, "float16"),
        ({"A": torch.zeros(2, 4, device="meta")}, ValueError, "one device"),
        ({"offsets": torch.tensor([0, 6])}, ValueError, r"with offsets, x must be \[M, d_in\]"),
        ({**FLAT, "offsets": torch.tensor([0, 6]).int()}, TypeError, "offsets must be int64; got int32"),
        ({**FLAT, "offsets": torch.tensor(6)}, ValueError, r"offsets must be \[P \+ 1\]"),
        ({**FLAT, "offsets": torch.zeros(2, device="meta").long()}, ValueError, "offsets must be on the device of x"),
        ({**FLAT, "A": torch.zeros(2, 2, 4), "offsets": torch.tensor([0, 6])}, ValueError, "A must be"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    good = {"x": torch.zeros(2, 3, 4), "delta": torch.zeros(2, 3, 5), "A": torch.zeros(2, 4), "B": None}
    with pytest.raises(error, match=words):
        lora_grad(**{**good, **change}, scale=1.0)


def test_backend_of():
    assert backend_of("lora_grad", "cpu") == ("cpu" if build_information()["loaded"] else "reference")
    assert backend_of("lora_grad", "mps") == "reference"
    with pytest.raises(KeyError, match="no operator named 'nothing'"):
        backend_of("nothing", "cpu")


def in_a_new_process(code: str, **variables: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **variables}).stdout


def test_the_reference_can_be_forced():
    code = (
        "import sys, torch; from r2f_ext.ops import *; from r2f_ext.ops import backend_of, build_information;"
        "print(backend_of('lora_grad', 'cpu'), 'r2f_ext._C' in sys.modules, build_information()['why_not_loaded']);"
        "print(lora_grad(torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(5, 3), scale=1.).grad_B.sum().item())"
    )
    said = in_a_new_process(code, R2F_FORCE_REFERENCE="1").splitlines()
    assert said == ["reference False R2F_FORCE_REFERENCE is set", str(4.0 * 5 * 2 * 3)]


@pytest.mark.skipif(not build_information()["loaded"], reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree(isa):
    code = (
        "import torch; from r2f_ext.ops import lora_grad, reference; torch.manual_seed(0);"
        "x, d, A, B = (torch.randn(*s).double() for s in [(3, 26, 33), (3, 26, 70), (11, 33), (70, 11)]);"
        "got = torch.ops.r2f.lora_grad(x, d, A, B, .5, .1); want = reference.lora_grad(x, d, A, B, .5, .1);"
        "print(max((g - w).abs().max().item() for g, w in zip(got, want)) < 1e-11)"
    )
    assert in_a_new_process(code, R2F_CPU_ISA=isa).strip() == "True"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no compiled kernels"),
        ({"torch": "1.0.0", "cuda_major": None}, "compiled for torch 1.0.0"),
        ({"torch": torch.__version__, "cuda_major": 3}, "compiled with CUDA 3"),
    ],
)
def test_a_module_built_for_another_torch_is_not_loaded(monkeypatch, record, reason):
    from r2f_ext.ops import backend

    monkeypatch.delenv("R2F_FORCE_REFERENCE", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backend, "_build", record)
    assert reason in backend._reason_to_stay_with_reference()


def test_environment_says_what_runs():
    told = environment()
    assert told["versions"]["torch"] == torch.__version__
    assert told["backends"]["lora_grad"]["cpu"] == backend_of("lora_grad", "cpu")
    assert told["build"] == build_information()
