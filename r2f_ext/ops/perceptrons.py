"""`perceptrons`: the perceptrons of all layers in one call, from features of updates to coefficients of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_perceptrons
from .graph import call, wants_graph
from .schemas import NAMESPACE


def perceptrons(inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """L decoders, each a multilayer perceptron `nn.Sequential(Linear, GELU, Linear, ...)` with its own batch.

    With K = len(weights) / L linear layers per decoder:

        h = z        h = gelu(W_j h + bias_j) for j < K        output = W_K h + bias_K

    Shapes (decoders l of any sizes):
        inputs   L tensors [b_l, n_l]
        weights  L K tensors [out, in]: those of the first decoder from its input to its output, then the second's, ...
        biases   L K tensors [out], in the same order
        returns  L tensors [b_l, out of the last linear layer]

    GELU is the exact form with erf (Hendrycks and Gimpel 2016). All tensors share one dtype, float32, float64 or
    bfloat16, which the results also have; matrix products are library calls. On CUDA, decoders of the same shapes are
    copied into stacked tensors and take one batched product per linear layer. Any strides. Differentiable once in all
    tensors.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, several devices.
        TypeError: dtypes that are not supported or differ from each other.
    """
    try:
        recorded = wants_graph(inputs, weights, biases)
        outputs: list[Tensor] = call(torch.ops.r2f.perceptrons.default, recorded, inputs, weights, biases, recorded)[0]
    except Exception:
        check_perceptrons(inputs, weights, biases)  # raises an error that names the argument
        raise
    return outputs


@torch.library.register_fake(f"{NAMESPACE}::perceptrons")
def _fake(
    inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor], with_saved: bool
) -> tuple[list[Tensor], list[Tensor]]:
    check_perceptrons(inputs, weights, biases)
    depth = len(weights) // len(inputs)
    shapes = [(len(inputs[k // depth]), len(weight)) for k, weight in enumerate(weights)]
    results = [inputs[0].new_empty(shape) for shape in shapes]
    hidden = [result for k, result in enumerate(results) if (k + 1) % depth]
    return results[depth - 1 :: depth], hidden if with_saved else []


@torch.library.register_fake(f"{NAMESPACE}::perceptrons_backward")
def _fake_backward(
    grads: list[Tensor], inputs: list[Tensor], weights: list[Tensor], saved: list[Tensor], needs_inputs: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    grad_inputs = [z.new_empty(z.shape) for z in inputs] if needs_inputs else []
    return grad_inputs, [w.new_empty(w.shape) for w in weights], [w.new_empty(len(w)) for w in weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], list[Tensor]]) -> None:
    z, weights, biases, _ = inputs
    ctx.decoders, ctx.linear_layers = len(z), len(weights)
    ctx.mark_non_differentiable(*output[1])
    ctx.save_for_backward(*z, *weights, *biases, *output[1])


def _backward(
    ctx: Any, grads: list[Tensor], _: list[Tensor]
) -> tuple[Sequence[Tensor | None], list[Tensor], list[Tensor], None]:
    if torch.is_grad_enabled():
        raise RuntimeError("perceptrons has no second derivative: call backward or grad without create_graph.")
    tensors, decoders, linear_layers = list(ctx.saved_tensors), ctx.decoders, ctx.linear_layers
    z, weights = tensors[:decoders], tensors[decoders : decoders + linear_layers]
    saved, needs_inputs = tensors[decoders + 2 * linear_layers :], any(ctx.needs_input_grad[0])
    if not saved and linear_layers > decoders:  # the operator itself was called, without `with_saved`
        biases = tensors[decoders + linear_layers : decoders + 2 * linear_layers]
        saved = torch.ops.r2f.perceptrons(z, weights, biases, True)[1]
    to_z, to_weights, to_biases = torch.ops.r2f.perceptrons_backward(grads, z, weights, saved, needs_inputs)
    return to_z if needs_inputs else [None] * decoders, to_weights, to_biases, None


torch.library.register_autograd(f"{NAMESPACE}::perceptrons", _backward, setup_context=_setup_context)
