"""perceptrons: the compiled operator and the reference against torch.nn and autograd in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from graph_cases import check_replay
from torch import Tensor, nn

from r2f_ext.ops import decoder_reference, perceptrons

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 6e-2}  # see `gradients`
RAGGED = [(7, 33, 5), (1, 1, 1), (64, 70, 16), (7, 33, 5), (300, 3, 9), (64, 70, 16)]  # n, hidden width, outputs
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def make(b=3, depth=2, shapes=RAGGED, dtype=torch.float32, device="cpu") -> Lists:
    """Inputs, weights and biases of decoders with `depth` linear layers."""
    inputs, weights, biases = [], [], []
    for n, hidden, out in shapes:
        widths = [n, *[hidden + j for j in range(depth - 1)], out]
        inputs.append(torch.randn(b, n))
        for before, after in pairwise(widths):
            weights.append(torch.randn(after, before) * (2 / max(before, 1)) ** 0.5)
            biases.append(torch.randn(after))
    return tuple([t.to(device, dtype) for t in each] for each in (inputs, weights, biases))


def by_modules(inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """The same by torch.nn, decoder by decoder, in float64."""
    depth, results = len(weights) // len(inputs), []
    for i, z in enumerate(inputs):
        modules: list[nn.Module] = []
        parameters: dict[str, Tensor] = {}
        for k in range(i * depth, (i + 1) * depth):
            modules += [nn.GELU()] if modules else []
            parameters[f"{len(modules)}.weight"], parameters[f"{len(modules)}.bias"] = weights[k], biases[k]
            modules.append(nn.Linear(weights[k].shape[1], weights[k].shape[0], device="meta"))
        parameters = {name: tensor.double() for name, tensor in parameters.items()}
        results.append(torch.func.functional_call(nn.Sequential(*modules), parameters, (z.double(),)))
    return results


def gradients(
    outputs: list[Tensor], variables: list[Tensor], factors: list[Tensor]
) -> tuple[list[Tensor], list[float]]:
    """The gradients of the outputs' products with the factors, and the norm of what each of them could be at most.

    A gradient is a sum over samples, whose rounding errors are proportional to its terms and not to the sum: where the
    terms cancel, as in decoders of a few numbers, the error in units of the sum has no bound. So the second value is
    the norm of the sum of the terms' absolute values.
    """
    terms = []
    for sample in range(len(factors[0])):
        masked = [torch.zeros_like(factor) for factor in factors]
        for mask, factor in zip(masked, factors, strict=True):
            mask[sample] = factor[sample]
        terms.append(torch.autograd.grad(outputs, variables, masked, retain_graph=True))
    per_variable = [torch.stack(each) for each in zip(*terms, strict=True)]
    return [t.sum(0).double() for t in per_variable], [float(t.double().abs().sum(0).norm()) for t in per_variable]


def assert_close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm().clamp_min(1e-30)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("b", [1, 3, 33])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(
    "function", [torch.ops.r2f.perceptrons, decoder_reference.perceptrons], ids=["operator", "reference"]
)
def test_values_are_those_of_torch_nn(device, dtype, b, depth, function):
    lists = make(b, depth, dtype=dtype, device=device)
    outputs, saved = function(*lists, True)
    assert_close(outputs, by_modules(*lists), dtype)
    assert [t.shape for t in saved] == [(b, hidden + j) for _, hidden, _ in RAGGED for j in range(depth - 1)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_gradients_are_those_of_autograd_through_torch_nn(device, dtype, depth):
    lists = make(5, depth, dtype=dtype, device=device)
    variables = [t.requires_grad_() for each in lists for t in each]
    expected_outputs = by_modules(*lists)
    factors = [torch.randn_like(t) for t in expected_outputs]
    expected, sizes = gradients(expected_outputs, variables, factors)
    factors = [factor.to(dtype) for factor in factors]
    with torch.no_grad():
        saved = decoder_reference.perceptrons(*lists)[1]
        by_reference = decoder_reference.perceptrons_backward(factors, *lists[:2], saved, True)
    for got in (
        torch.autograd.grad(perceptrons(*lists), variables, factors),
        torch.autograd.grad(torch.ops.r2f.perceptrons(*lists, True)[0], variables, factors),
        torch.autograd.grad(torch.ops.r2f.perceptrons(*lists, False)[0], variables, factors),
        [g for each in by_reference for g in each],
    ):
        for one, other, size in zip(got, expected, sizes, strict=True):
            assert one.shape == other.shape and one.dtype == dtype
            assert (one.double() - other).norm() <= GRADIENT_TOLERANCE[dtype] * max(size, 1e-30)


@pytest.mark.parametrize("depth", [1, 3])
def test_first_derivatives_by_finite_differences(device, depth):
    lists = make(2, depth, [(3, 4, 2), (2, 3, 2), (3, 4, 2)], torch.float64, device)
    variables = [t.requires_grad_() for each in lists for t in each]
    layers = 3 * depth

    def function(*t: Tensor) -> tuple[Tensor, ...]:
        return tuple(perceptrons(t[:3], t[3 : 3 + layers], t[3 + layers :]))

    assert torch.autograd.gradcheck(function, variables)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_that_need_no_gradient_get_none(device, which):
    lists = make(dtype=torch.float64, device=device)
    variables = [t.requires_grad_() for t in lists[which]]
    expected = torch.autograd.grad(sum(t.square().sum() for t in by_modules(*lists)), variables)
    sum(t.square().sum() for t in perceptrons(*lists)).backward()
    for variable, want in zip(variables, expected, strict=True):
        torch.testing.assert_close(variable.grad, want)
    assert all(t.grad is None for each in lists for t in each if not t.requires_grad)


def test_a_second_derivative_is_refused(device):
    lists = make(2, device=device)
    lists[1][0].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(perceptrons(*lists)[0].square().sum(), lists[1][0], create_graph=True)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("b", [0, 2])
@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_empty_tensors(device, b, shape):
    lists = make(b, 2, [shape, (2, 3, 4)], torch.float64, device)
    variables = [t.requires_grad_() for each in lists for t in each]
    outputs, expected = perceptrons(*lists), by_modules(*lists)
    grads = torch.autograd.grad([t.sum() for t in outputs], variables)
    expected_grads = torch.autograd.grad([t.sum() for t in expected], variables)
    for got, want in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(got, want)


def test_any_strides_and_deterministic(device):
    lists = make(device=device)
    outputs = perceptrons(*lists)
    assert all(torch.equal(x, y) for x, y in zip(outputs, perceptrons(*lists), strict=True))
    inputs, weights = ([t.mT.contiguous().mT for t in each] for each in lists[:2])
    for got, want in zip(perceptrons(inputs, weights, lists[2]), outputs, strict=True):
        torch.testing.assert_close(got, want)


def test_without_gradients_nothing_is_saved(device):
    lists = make(device=device)
    assert torch.ops.r2f.perceptrons(*lists, False)[1] == decoder_reference.perceptrons(*lists, False)[1] == []
    lists[1][0].requires_grad_()
    assert perceptrons(*lists)[0].requires_grad and not perceptrons(*lists)[1].is_leaf
    with torch.no_grad():
        assert not perceptrons(*lists)[0].requires_grad


@pytest.mark.parametrize("depth", [1, 2])
def test_operator_rules(device, depth):
    lists = make(2, depth, device=device)
    torch.library.opcheck(torch.ops.r2f.perceptrons.default, (*lists, True))
    learning = (lists[0], *([t.clone().requires_grad_() for t in each] for each in lists[1:]))
    torch.library.opcheck(torch.ops.r2f.perceptrons.default, (*learning, True))
    everything = tuple([t.clone().requires_grad_() for t in each] for each in lists)
    torch.library.opcheck(torch.ops.r2f.perceptrons.default, (*everything, True))
    outputs, saved = torch.ops.r2f.perceptrons(*lists, True)
    for needs_inputs in (True, False):
        arguments = (outputs, *lists[:2], saved, needs_inputs)
        torch.library.opcheck(torch.ops.r2f.perceptrons_backward.default, arguments)


@pytest.mark.slow
def test_inside_torch_compile(device):
    lists = make(2, 2, [(3, 4, 2), (2, 3, 2)], device=device)
    variables = [t.requires_grad_() for each in lists for t in each]

    def loss(*t: Tensor) -> Tensor:
        return sum(output.square().sum() for output in perceptrons(t[:2], t[2:6], t[6:]))

    expected = torch.autograd.grad(loss(*variables), variables)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*variables), variables)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_under_cuda_graph_capture():
    lists = make(device="cuda")
    variables = [t.requires_grad_() for each in lists for t in each]

    def step() -> list[Tensor]:
        outputs = perceptrons(*lists)
        return [*outputs, *torch.autograd.grad([t.sum() for t in outputs], variables)]

    check_replay(step, lists[0][0])


def good() -> dict:
    zeros = torch.zeros
    return {
        "inputs": [zeros(2, 3), zeros(2, 4)],
        "weights": [zeros(5, 3), zeros(2, 5), zeros(6, 4), zeros(2, 6)],
        "biases": [zeros(5), zeros(2), zeros(6), zeros(2)],
    }


@pytest.mark.parametrize(
    ("name", "index", "tensor", "error", "words"),
    [
        ("inputs", 1, torch.zeros(4), ValueError, r"inputs\[1\] is \[4\]"),
        ("weights", 1, torch.zeros(2, 4), ValueError, r"weights\[1\] must be \[out, 5\]"),
        ("biases", 2, torch.zeros(1), ValueError, r"biases\[2\] must be \[6\]"),
        ("inputs", 0, torch.zeros(2, 3).half(), TypeError, "float16"),
        ("weights", 3, torch.zeros(2, 6).double(), TypeError, r"weights\[3\] must be torch.float32"),
        ("biases", 3, torch.zeros(2, device="meta"), ValueError, r"one device, cpu; biases\[3\]"),
    ],
)
def test_errors_name_the_argument(name, index, tensor, error, words):
    arguments = good()
    assert [t.shape for t in perceptrons(**arguments)] == [(2, 2), (2, 2)]
    arguments[name][index] = tensor
    with pytest.raises(error, match=words):
        perceptrons(**arguments)


@pytest.mark.parametrize(
    "change", [{"inputs": []}, {"weights": []}, {"biases": []}, {"weights": good()["weights"][:3]}]
)
def test_lists_of_wrong_lengths_are_refused(change):
    with pytest.raises(ValueError, match="same number of weights and as many biases"):
        perceptrons(**{**good(), **change})
