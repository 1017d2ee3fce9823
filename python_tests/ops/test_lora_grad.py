"""lora_grad: the compiled kernels against the reference, both against autograd, and the rules every operator keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from r2f_ext.env import environment
from r2f_ext.ops import LoraGrad, backend_of, build_information, lora_grad, reference

RANKS = [1, 2, 3, 4, 8, 11, 16, 17, 32, 33, 64]
SHAPES = [(3, 5, 33, 17), (2, 49, 16, 130), (4, 65, 128, 96), (1, 1, 1, 1), (1, 26, 1030, 7)]  # P, N, d_in, d_out
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 1e-5,
}  # bfloat16 is summed in float32
B_KINDS = ["none", "shared", "per group"]


class Inputs(NamedTuple):
    """What the operator takes, with B = [] for none."""

    x: list[Tensor]
    delta: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]
    scales: list[float]

    def call(self) -> LoraGrad:
        return lora_grad(self.x, self.delta, self.A, self.B or None, scales=self.scales)


def make(shapes, rank, dtype=torch.float32, device="cpu", A_per_group=False, B="none") -> Inputs:
    inputs = Inputs([], [], [], [], [])
    for layer, (P, N, d_in, d_out) in enumerate(shapes):
        groups = (P,) if A_per_group else ()
        inputs.x.append(torch.randn(P, N, d_in).to(device, dtype))
        inputs.delta.append(torch.randn(P, N, d_out).to(device, dtype))
        inputs.A.append(torch.randn(*groups, rank, d_in).to(device, dtype))
        if B != "none":
            groups = (P,) if B == "per group" else ()
            inputs.B.append(torch.randn(*groups, d_out, rank).to(device, dtype))
        inputs.scales.append(0.5 + layer)
    return inputs


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    assert result.shape == expected.shape
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance * max(size, 1.0))


def as_documented(grad_B: Tensor) -> bool:
    """The layout of [..., d_out, r]: rows of r numbers on CUDA, else columns of d_out."""
    return grad_B.is_contiguous() if grad_B.is_cuda else grad_B.mT.is_contiguous()


def by_definition(inputs: Inputs) -> LoraGrad:
    """From the dense G, in float64."""
    grad_A, grad_B = [], []
    for layer, scale in enumerate(inputs.scales):
        G = inputs.delta[layer].double().mT @ inputs.x[layer].double()
        grad_B.append(scale * (G @ inputs.A[layer].double().mT))
        if inputs.B:
            grad_A.append(scale * (inputs.B[layer].double().mT @ G))
    return LoraGrad(grad_A, grad_B)


def assert_all_close(result, expected, tolerance: float) -> None:
    for got_list, expected_list in zip(result, expected, strict=True):
        for got, want in zip(got_list, expected_list, strict=True):
            assert_close(got, want, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("B", B_KINDS)
def test_agrees_with_the_definition_and_the_reference(device, dtype, rank, B):
    inputs = make(SHAPES, rank, dtype, device, A_per_group=B == "per group", B=B)
    result = inputs.call()
    assert all(t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for t in result.grad_B)
    assert all(as_documented(t) for t in result.grad_B)
    assert_all_close(result, by_definition(inputs), TOLERANCE[dtype])
    assert_all_close(torch.ops.r2f.lora_grad(*inputs), reference.lora_grad(*inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 16, 17, 32, 33])
def test_many_layers_of_many_sizes(device, dtype, rank):
    """More layers than one table of the CUDA kernels holds (64), at every rank range, one layer of another rank."""
    shapes = [(3, 1 + layer % 3, 8 * (1 + layer % 5), 24 * (1 + layer % 2)) for layer in range(70)]
    inputs = make(shapes, rank, dtype, device)
    inputs.A[5] = inputs.A[5][:3]
    assert_all_close(inputs.call(), by_definition(inputs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [8, 16, 33])
@pytest.mark.parametrize("A_per_group", [False, True])
def test_one_layer(device, dtype, rank, A_per_group):
    """On CUDA the library computes it from rank 9 on in float32."""
    inputs = make([(4, 65, 128, 96)], rank, dtype, device, A_per_group)
    (found,) = inputs.call().grad_B
    assert as_documented(found)
    assert_close(found, by_definition(inputs).grad_B[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_many_groups(device, dtype):
    """Enough for the CUDA kernels to divide the work by columns alone, not by tokens as well."""
    inputs = make([(700, 3, 8, 384)], 8, dtype, device)
    assert_all_close(inputs.call(), by_definition(inputs), TOLERANCE[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rank", [8, 64])
def test_inside_a_cuda_graph(rank):
    inputs = make([(3, 4, 32, 24), (2, 5, 33, 20)], rank, device="cuda", B="shared")
    expected = inputs.call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = inputs.call()
    graph.replay()
    assert_all_close(result, expected, 0.0)


@pytest.mark.parametrize("start_at_zero", [True, False])
def test_agrees_with_autograd_of_an_adapted_linear_layer(device, start_at_zero):
    P, N, d_in, d_out, rank, scale = 3, 10, 24, 18, 4, 2.0
    layer = torch.nn.Linear(d_in, d_out, dtype=torch.float64, device=device)
    inputs = make([(P, N, d_in, d_out)], rank, torch.float64, device, B="shared")
    x, A, B = inputs.x[0], inputs.A[0], inputs.B[0]
    B = torch.zeros_like(B) if start_at_zero else B
    A, B, targets = A.requires_grad_(), B.requires_grad_(), torch.randn(P, N, d_out, dtype=torch.float64, device=device)
    deltas, expected = [], []
    for p in range(P):
        y = layer(x[p]) + scale * (x[p] @ A.T) @ B.T
        loss = torch.nn.functional.mse_loss(torch.tanh(y), targets[p])
        *grads, delta = torch.autograd.grad(loss, [A, B, y])
        deltas.append(delta)
        expected.append(grads)
    found = lora_grad([x], [torch.stack(deltas)], [A.detach()], None if start_at_zero else [B.detach()], scales=[scale])
    for p in range(P):
        torch.testing.assert_close(found.grad_B[0][p], expected[p][1])
        if start_at_zero:
            assert found.grad_A == [] and not expected[p][0].any()
        else:
            torch.testing.assert_close(found.grad_A[0][p], expected[p][0])


@pytest.mark.parametrize("rank", [2, 40])
@pytest.mark.parametrize("shape", [(0, 3, 8, 16), (2, 0, 8, 16), (2, 3, 0, 16), (2, 3, 8, 0)])
@pytest.mark.parametrize("B", B_KINDS)
def test_empty_inputs_give_zeros(device, shape, B, rank):
    P, _, d_in, d_out = shape
    for dtype in TOLERANCE:
        result = make([shape, (2, 3, 8, 8)], rank, dtype, device, B == "per group", B).call()
        assert result.grad_B[0].shape == (P, d_out, rank) and not result.grad_B[0].any()
        assert result.grad_B[1].any()
        if B != "none":
            assert result.grad_A[0].shape == (P, rank, d_in) and not result.grad_A[0].any()


def test_any_strides(device):
    inputs = make([(3, 6, 20, 16)], 4, device=device, A_per_group=True, B="per group")
    x, delta, A, B = (each[0] for each in inputs[:4])
    strided = [t.mT.contiguous().mT for t in (x, delta, A)] + [B.repeat(1, 2, 1)[:, ::2].contiguous().flip(1)]
    got = Inputs(*([t] for t in strided), inputs.scales)
    assert_all_close(got.call(), by_definition(got), 1e-5)
    unaligned = torch.randn(3 * 6 * 20 + 1, device=device)[1:].view(3, 6, 20)
    got = inputs._replace(x=[unaligned])
    assert_all_close(got.call(), by_definition(got), 1e-5)


def test_an_expanded_A_counts_as_shared(device):
    inputs = make([(3, 6, 20, 16)], 4, device=device)
    expanded = inputs._replace(A=[inputs.A[0].expand(3, -1, -1)])
    assert_all_close(expanded.call(), inputs.call(), 1e-6)


def test_results_are_deterministic(device):
    inputs = make([(6, 70, 96, 40), (6, 70, 40, 96)], 8, device=device, B="shared")
    assert_all_close(inputs.call(), inputs.call(), 0.0)


@pytest.mark.parametrize("B", B_KINDS)
def test_first_and_second_derivatives_of_the_raw_operator(device, B):
    inputs = make([(2, 3, 4, 3), (1, 2, 3, 4)], 2, torch.float64, device, A_per_group=B == "per group", B=B)
    variables = [t.requires_grad_() for each in inputs[:4] for t in each]

    def function(*tensors: Tensor) -> list[Tensor]:
        x, delta, A, *with_B = (list(tensors[i : i + 2]) for i in range(0, len(tensors), 2))
        grad_A, grad_B = torch.ops.r2f.lora_grad(x, delta, A, with_B[0] if with_B else [], inputs.scales)
        return (*grad_A, *grad_B)

    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables)


def test_only_what_is_asked_for_is_differentiated(device):
    """One input of one layer, and the result of one layer."""
    inputs = make([(2, 3, 4, 5), (2, 3, 4, 5)], 2, torch.float64, device)
    inputs.delta[1].requires_grad_()
    found = inputs.call().grad_B
    assert found[1].requires_grad
    (got,) = torch.autograd.grad(found[1].sum(), inputs.delta[1])
    (expected,) = torch.autograd.grad(by_definition(inputs).grad_B[1].sum(), inputs.delta[1])
    torch.testing.assert_close(got, expected)


def test_gradients_follow_the_dtype_of_the_input():
    inputs = make([(2, 3, 4, 5)], 2, torch.bfloat16, B="shared")
    tensors = [t.requires_grad_() for each in inputs[:4] for t in each]
    found = inputs.call()
    (found.grad_A[0].sum() + found.grad_B[0].sum()).backward()
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("B", ["none", "per group"])
@pytest.mark.parametrize("rank", [3, 33])
def test_operator_rules(device, B, rank):
    inputs = make([(2, 5, 8, 8), (3, 2, 6, 7)], rank, device=device, B=B)
    for each in inputs[:4]:
        for tensor in each:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.r2f.lora_grad.default, tuple(inputs))


@pytest.mark.slow
def test_inside_torch_compile(device):
    inputs = make([(2, 5, 6, 7), (2, 5, 7, 6)], 3, device=device, B="shared")
    x = inputs.x[0].requires_grad_()

    def loss(x: Tensor) -> Tensor:
        found = lora_grad([x, inputs.x[1]], inputs.delta, inputs.A, inputs.B, scales=inputs.scales)
        return found.grad_A[0].square().sum() + found.grad_B[0].square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be \[P, N, d_in\]"),
        ({"delta": torch.zeros(2, 4, 5)}, ValueError, "same P and N; layer 1 has"),
        ({"A": torch.zeros(2, 9)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(3, 2, 4)}, ValueError, r"A must be \[r, d_in\]"),
        ({"A": torch.zeros(0, 4)}, ValueError, "rank must be at least 1"),
        ({"B": torch.zeros(2, 5)}, ValueError, r"B must be \[d_out, r\]"),
        ({"A": torch.zeros(2, 4).double()}, TypeError, "one dtype.*layer 1 has x float32, delta float32, A float64"),
        ({"x": torch.zeros(2, 3, 4).half()}, TypeError, "x float16"),
        ({"A": torch.zeros(2, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_errors_name_the_argument_and_the_layer(change, error, words):
    good = {"x": torch.zeros(2, 3, 4), "delta": torch.zeros(2, 3, 5), "A": torch.zeros(2, 4), "B": torch.zeros(5, 2)}
    lists = {name: [tensor, change.get(name, tensor)] for name, tensor in good.items()}
    with pytest.raises(error, match=words):
        lora_grad(**lists, scales=[1.0, 1.0])


@pytest.mark.parametrize("drop", ["x", "delta", "A", "B", "scales", "all"])
def test_lists_of_different_lengths_are_refused(drop):
    lists = make([(2, 3, 4, 5)] * 2, 2, B="shared")._asdict()
    lists = {name: each[: 0 if drop == "all" else 1 if name == drop else 2] for name, each in lists.items()}
    with pytest.raises(ValueError, match="lora_grad: lists of one length, at least 1, are needed; got x"):
        lora_grad(**lists)


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
        "found = lora_grad([torch.ones(1, 2, 3)], [torch.ones(1, 2, 4)], [torch.ones(5, 3)], scales=[1.]);"
        "print(found.grad_B[0].sum().item())"
    )
    said = in_a_new_process(code, R2F_FORCE_REFERENCE="1").splitlines()
    assert said == ["reference False R2F_FORCE_REFERENCE is set", str(4.0 * 5 * 2 * 3)]


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
