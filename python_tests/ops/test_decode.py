"""decode: the compiled kernels against the reference, both against torch.nn.Sequential and autograd."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from r2f_ext.ops import backend_of, build_information, decode, decoder_reference

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-5}
ROUNDED = 0.02  # relative error of all layers together, where the library multiplies bfloat16 matrices
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "identity": nn.Identity}
RAGGED = [(7, 33, 5, 130), (1, 1, 1, 1), (64, 70, 16, 515), (300, 3, 9, 37)]  # n, width, k, m


@dataclass
class Case:
    inputs: list[Tensor]
    weights: list[list[Tensor]]  # [map][layer]
    biases: list[list[Tensor]] | None
    bases: list[Tensor] | None

    def all(self) -> list[Tensor]:
        biases = [t for each in self.biases or [] for t in each]
        return [*self.inputs, *(t for each in self.weights for t in each), *biases, *(self.bases or [])]

    def raw(self) -> tuple[list[Tensor], ...]:
        """As the operators take them: layer by layer."""
        weights, biases = (
            [t for layer in zip(*maps, strict=True) for t in layer] for maps in (self.weights, self.biases or [])
        )
        return self.inputs, weights, biases, self.bases or []


def make(b=3, hidden=2, shapes=RAGGED, dtype=torch.float32, device="cpu", bias=True, basis=True) -> Case:
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape)).to(device, dtype)

    widths = [[n, *[width + j for j in range(hidden)], k if basis else m] for n, width, k, m in shapes]
    maps = range(hidden + 1)
    return Case(
        [random(b, n) for n, _, _, _ in shapes],
        [[random(w[j + 1], w[j], scale=(2 / max(w[j], 1)) ** 0.5) for w in widths] for j in maps],
        [[random(w[j + 1]) for w in widths] for j in maps] if bias else None,
        [random(k, m) for _, _, k, m in shapes] if basis else None,
    )


def by_modules(case: Case, activation: str, normalize: bool) -> list[Tensor]:
    """The same by torch.nn, layer by layer, in float64."""
    results = []
    for layer, z in enumerate(case.inputs):
        modules: list[nn.Module] = []
        parameters: dict[str, Tensor] = {}
        for j, each in enumerate(case.weights):
            if j > 0:
                modules.append(ACTIVATIONS[activation]())
            weight = each[layer].double()
            parameters[f"{len(modules)}.weight"] = weight
            if case.biases is not None:
                parameters[f"{len(modules)}.bias"] = case.biases[j][layer].double()
            modules.append(nn.Linear(weight.shape[1], weight.shape[0], bias=case.biases is not None, device="meta"))
        z = z.double()
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True) if normalize else z.new_ones(len(z), 1)
        result = norm * torch.func.functional_call(nn.Sequential(*modules), parameters, (z / norm,))
        results.append(result if case.bases is None else result @ case.bases[layer].double())
    return results


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=factor * TOLERANCE[dtype] * scale)


def all_close(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, rounded: bool, factor=1.0) -> None:
    if got and dtype == torch.bfloat16 and rounded:
        one, other = (torch.cat([t.double().flatten() for t in each]) for each in (got, expected))
        assert (one - other).norm() <= ROUNDED * other.norm()
        return
    for one, other in zip(got, expected, strict=True):
        close(one, other, dtype, factor)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("b", [1, 3, 8, 33, 70])
@pytest.mark.parametrize(
    ("hidden", "activation", "normalize"),
    [(0, "gelu", True), (1, "relu", False), (2, "gelu", True), (4, "identity", False)],
)
@pytest.mark.parametrize(("bias", "basis"), [(True, True), (False, False), (True, False)])
def test_agrees_with_torch_nn_and_the_reference(device, dtype, b, hidden, activation, normalize, bias, basis):
    case = make(b, hidden, dtype=dtype, device=device, bias=bias, basis=basis)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = decode(case.inputs, case.weights, case.biases, case.bases, activation=activation, normalize=normalize)
    expected = by_modules(case, activation, normalize)
    assert all(got.dtype == wide and got.is_contiguous() for got in outputs)
    all_close(outputs, expected, dtype, b > 8)
    lists, settings = case.raw(), (activation, normalize)
    want_outputs, want_kept = decoder_reference.decode(*lists, *settings)
    got_outputs, got_kept = torch.ops.r2f.decode(*lists, *settings)
    all_close([*got_outputs, got_kept], [*want_outputs, want_kept], dtype, b > 8)
    grads = [torch.randn_like(t) for t in want_outputs]
    got_all = torch.ops.r2f.decode_backward(grads, *lists, want_kept, *settings, True, True, True)
    want_all = decoder_reference.decode_backward(grads, *lists, want_kept, *settings, True, True, True)
    for got_list, want_list in zip(got_all, want_all, strict=True):
        assert all(got.dtype == wide for got in got_list)
        all_close(got_list, want_list, dtype, True, 10)


@pytest.mark.parametrize("b", [2, 17])
@pytest.mark.parametrize("basis", [True, False])
def test_gradients_against_autograd_through_torch_nn(device, b, basis):
    case = make(b, dtype=torch.float64, device=device, basis=basis)
    variables = [t.requires_grad_() for t in case.all()]
    expected = by_modules(case, "gelu", True)
    factors = [torch.randn_like(t) for t in expected]
    expected_grads = torch.autograd.grad(expected, variables, factors)
    outputs = decode(case.inputs, case.weights, case.biases, case.bases, normalize=True)
    for got, want in zip(torch.autograd.grad(outputs, variables, factors), expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12 * max(1.0, float(want.abs().max())))


def test_forward_mode_is_refused_and_not_dropped(device):
    z, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda t: decode([t], [[w]])[0], (z,), (z,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        decode([torch.autograd.forward_ad.make_dual(z, z)], [[w]])


@pytest.mark.parametrize("which", ["inputs", "biases", "bases"])
def test_only_what_is_wanted_gets_a_gradient(device, which):
    case = make(dtype=torch.float64, device=device)
    named = {"inputs": case.inputs, "biases": [t for each in case.biases for t in each], "bases": case.bases}
    wanted = [t.requires_grad_() for t in named[which]]
    expected = torch.autograd.grad(sum(t.square().sum() for t in by_modules(case, "gelu", False)), wanted)
    got = torch.autograd.grad(
        sum(t.square().sum() for t in decode(case.inputs, case.weights, case.biases, case.bases)), wanted
    )
    for g, want in zip(got, expected, strict=True):
        torch.testing.assert_close(g, want)


@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("normalize", [True, False])
def test_first_derivatives(device, activation, normalize):
    case = make(2, 1, [(3, 4, 2, 5), (2, 3, 2, 4)], torch.float64, device)
    variables = [t.requires_grad_() for t in case.all()]

    def function(*t: Tensor) -> tuple[Tensor, ...]:
        weights, biases = [t[2:4], t[4:6]], [t[6:8], t[8:10]]
        return tuple(decode(t[:2], weights, biases, t[10:], activation=activation, normalize=normalize))

    assert torch.autograd.gradcheck(function, variables)


def test_stacked_decoders_are_lists_of_views(device):
    case = make(4, 1, [(12, 9, 5, 40)] * 3, device=device)
    stacked = [[torch.stack(each).requires_grad_() for each in maps] for maps in (case.weights, case.biases)]
    z, bases = torch.stack(case.inputs), torch.stack(case.bases)
    outputs = decode(z, *stacked, bases)
    for got, want in zip(outputs, decode(case.inputs, case.weights, case.biases, case.bases), strict=True):
        assert torch.equal(got, want)
    torch.stack(outputs).square().sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.any() for maps in stacked for t in maps)


@pytest.mark.parametrize("b", [2, 20])
def test_normalized_decoders_are_homogeneous_and_nothing_decodes_to_nothing(device, b):
    case = make(b, device=device)
    outputs = decode(case.inputs, case.weights, case.biases, case.bases, normalize=True)
    for scale in (1e-22, 1e12):  # squares would leave float32
        scaled = decode([scale * z for z in case.inputs], case.weights, case.biases, case.bases, normalize=True)
        for got, want in zip(scaled, outputs, strict=True):
            close(got.double() / scale, want, torch.float32)
    nothing = [torch.zeros_like(z).requires_grad_() for z in case.inputs]
    outputs = decode(nothing, case.weights, case.biases, case.bases, normalize=True)
    assert not any(t.any() for t in outputs)
    assert not any(g.any() for g in torch.autograd.grad([t.sum() for t in outputs], nothing))


def test_nans_pass_through(device):
    case = make(2, device=device)
    case.inputs[2][1, 5] = float("nan")
    outputs = decode(case.inputs, case.weights, case.biases, case.bases, normalize=True)
    assert torch.isnan(outputs[2][1]).all() and not torch.isnan(outputs[2][0]).any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("b", [0, 2, 20])
@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (4, 0, 3, 5), (4, 3, 0, 5), (4, 3, 2, 0)])
def test_empty_tensors(device, b, shape):
    case = make(b, 1, [shape, (2, 3, 4, 5)], torch.float64, device)
    variables = [t.requires_grad_() for t in case.all()]
    outputs = decode(case.inputs, case.weights, case.biases, case.bases)
    expected = by_modules(case, "gelu", False)
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want)
    grads = torch.autograd.grad([t.sum() for t in outputs], variables)
    for got, want in zip(grads, torch.autograd.grad([t.sum() for t in expected], variables), strict=True):
        torch.testing.assert_close(got, want)


def test_any_strides_and_deterministic(device):
    for b in (3, 20):
        case = make(b, device=device)
        outputs = decode(case.inputs, case.weights, case.biases, case.bases)
        again = decode(case.inputs, case.weights, case.biases, case.bases)
        assert all(torch.equal(x, y) for x, y in zip(outputs, again, strict=True))
        strided = [[t.mT.contiguous().mT for t in each] for each in (case.inputs, *case.weights, case.bases)]
        size = case.bases[2].numel()  # one that starts off every boundary
        strided[-1][2] = torch.empty(size + 1, device=device)[1:].view_as(case.bases[2]).copy_(case.bases[2])
        for got, want in zip(decode(strided[0], strided[1:-1], case.biases, strided[-1]), outputs, strict=True):
            torch.testing.assert_close(got, want)


def test_a_sample_does_not_depend_on_its_batch(device):
    case = make(8, device=device)
    outputs = decode(case.inputs, case.weights, case.biases, case.bases, normalize=True)
    alone = decode([z[5:6] for z in case.inputs], case.weights, case.biases, case.bases, normalize=True)
    for got, want in zip(alone, outputs, strict=True):
        close(got, want[5:6], torch.float32)


def test_gradients_follow_the_dtype_of_the_input(device):
    case = make(dtype=torch.bfloat16, device=device)
    variables = [t.requires_grad_() for t in case.all()]
    torch.autograd.backward([t.sum() for t in decode(case.inputs, case.weights, case.biases, case.bases)])
    assert all(t.grad.dtype == torch.bfloat16 and t.grad.shape == t.shape for t in variables)


def test_asking_for_a_second_derivative_is_an_error(device):
    case = make(2, 1, [(3, 4, 2, 5)], device=device)
    case.inputs[0].requires_grad_()
    (output,) = decode(case.inputs, case.weights, case.biases, case.bases)
    (grad,) = torch.autograd.grad(output.square().sum(), case.inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("b", [2, 20])
@pytest.mark.parametrize(("bias", "basis"), [(True, True), (False, False)])
def test_operator_rules(device, b, bias, basis):
    lists, settings = make(b, device=device, bias=bias, basis=basis).raw(), ("gelu", True)
    torch.library.opcheck(torch.ops.r2f.decode.default, (*lists, *settings))
    outputs, kept = torch.ops.r2f.decode(*lists, *settings)
    for wanted in [(True, True, True), (False, True, False)]:
        torch.library.opcheck(torch.ops.r2f.decode_backward.default, (outputs, *lists, kept, *settings, *wanted))


@pytest.mark.slow
def test_inside_torch_compile(device):
    case = make(2, 1, [(3, 4, 2, 5), (2, 3, 2, 4)], device=device)
    variables = [t.requires_grad_() for t in case.all()]

    def loss(*t: Tensor) -> Tensor:
        outputs = decode(t[:2], [t[2:4], t[4:6]], [t[6:8], t[8:10]], t[10:], normalize=True)
        return sum(output.square().sum() for output in outputs)

    expected = torch.autograd.grad(loss(*variables), variables)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*variables), variables)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("b", [2, 20])
def test_under_cuda_graph_capture(b):
    case = make(b, device="cuda")
    variables = [t.requires_grad_() for t in case.all()]

    def step() -> list[Tensor]:
        outputs = decode(case.inputs, case.weights, case.biases, case.bases, normalize=True)
        return [*outputs, *torch.autograd.grad([t.sum() for t in outputs], variables)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        case.inputs[0].mul_(-0.5)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected)


def good() -> dict:
    zeros = torch.zeros
    return {
        "inputs": [zeros(2, 3), zeros(2, 4)],
        "weights": [[zeros(5, 3), zeros(6, 4)], [zeros(2, 5), zeros(2, 6)]],
        "biases": [[zeros(5), zeros(6)], [zeros(2), zeros(2)]],
        "bases": [zeros(2, 7), zeros(2, 8)],
    }


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({}, None, ""),
        ({"inputs": []}, ValueError, "same number of layers"),
        ({"bases": [torch.zeros(2, 7)]}, ValueError, "same number of layers"),
        ({"inputs": [torch.zeros(2, 3), torch.zeros(1, 4)]}, ValueError, "with one b"),
        ({"weights": []}, ValueError, "1 to 5 maps"),
        ({"biases": [[torch.zeros(5), torch.zeros(6)]]}, ValueError, "as many; got 2 and 1"),
        ({"weights": [good()["weights"][0], [torch.zeros(2, 4), torch.zeros(2, 6)]]}, ValueError, r"weights\[1\]\[0\]"),
        (
            {"biases": [[torch.zeros(5), torch.zeros(1)], good()["biases"][1]]},
            ValueError,
            r"biases\[0\]\[1\] must be \[6\]",
        ),
        ({"bases": [torch.zeros(3, 7), torch.zeros(2, 8)]}, ValueError, r"bases\[0\] must be \[2, m\]"),
        ({"activation": "tanh"}, ValueError, "activation must be one of gelu"),
        ({"inputs": [torch.zeros(2, 3).half(), torch.zeros(2, 4)]}, TypeError, "float16"),
        ({"bases": [torch.zeros(2, 7).double(), torch.zeros(2, 8)]}, TypeError, "share one dtype"),
        ({"bases": [torch.zeros(2, 7, device="meta"), torch.zeros(2, 8)]}, ValueError, "one device"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    if error is None:
        assert [t.shape for t in decode(**good())] == [(2, 7), (2, 8)]
        return
    with pytest.raises(error, match=words):
        decode(**{**good(), **change})


@pytest.mark.skipif(backend_of("decode", "cpu") != "cpu", reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_narrower_instruction_sets_agree(isa):
    assert build_information()["loaded"]
    code = (
        "import torch; from r2f_ext.ops import decoder_reference; torch.manual_seed(0);"
        "lists = [[torch.randn(3, 37).double()], [torch.randn(35, 37).double(), torch.randn(9, 35).double()],"
        "         [torch.randn(35).double(), torch.randn(9).double()], [torch.randn(9, 1049).double()]];"
        "got = torch.ops.r2f.decode(*lists, 'gelu', True); want = decoder_reference.decode(*lists, 'gelu', True);"
        "print(torch.allclose(got[0][0], want[0][0]) and torch.allclose(got[1], want[1]))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "R2F_CPU_ISA": isa}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip() == "True"
