"""Perceptrons of all layers in one call, against the best plain PyTorch forms, on the embedded model's decoders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from layers import EMBEDDED
from measure import Functions
from torch import Tensor

from r2f_ext.ops import perceptrons

pytestmark = pytest.mark.benchmark(group="perceptrons")
RANK, HIDDEN, OUT = 8, 256, 256


def parameters(widths: list[int], device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of a hidden and an output layer for each of the model's layers, decoder by decoder."""
    shapes = [shape for width in widths for shape in ((HIDDEN, width), (OUT, HIDDEN))]
    weights = [torch.randn(shape, device=device) / shape[1] ** 0.5 for shape in shapes]
    return weights, [torch.randn(len(w), device=device) for w in weights]


def loop(inputs: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """One layer of the model after another."""
    return [
        F.linear(F.gelu(F.linear(z, w1, b1)), w2, b2)
        for z, w1, w2, b1, b2 in zip(inputs, weights[::2], weights[1::2], biases[::2], biases[1::2], strict=True)
    ]


@pytest.mark.parametrize("batch", [1, 2, 64])
def bench_perceptrons(versus: Callable[..., None], device: str, batch: int) -> None:
    widths = [d_out * RANK for d_out, _ in EMBEDDED]

    def make() -> Functions:
        weights, biases = parameters(widths, device)
        inputs = [torch.randn(batch, width, device=device) for width in widths]
        return {
            "ours": lambda: perceptrons(inputs, weights, biases),
            "loop of F.linear": lambda: loop(inputs, weights, biases),
        }

    read = sum(HIDDEN * (width + 1) + OUT * (HIDDEN + 1) for width in widths)
    with torch.no_grad():
        versus("perceptrons", [batch, len(widths)], make, traffic=4.0 * read, flops=2.0 * batch * read)


def bench_perceptrons_training(versus: Callable[..., None], device: str) -> None:
    """Forward and backward to the weights and biases, as a step of the MLP decoder's training."""
    widths, batch = [d_out * RANK for d_out, _ in EMBEDDED], 64

    def make() -> Functions:
        weights, biases = parameters(widths, device)
        inputs = [torch.randn(batch, width, device=device) for width in widths]
        leaves = [p.requires_grad_() for p in (*weights, *biases)]

        def both(forward: Callable[..., list[Tensor]]) -> Callable[[], object]:
            def run() -> object:
                losses = [outputs.square().sum() for outputs in forward(inputs, weights, biases)]
                return torch.autograd.grad(losses, leaves)

            return run

        return {"ours": both(perceptrons), "loop of F.linear": both(loop)}

    products = sum(HIDDEN * (2 * width + 3 * OUT) for width in widths)
    versus("perceptrons, forward and backward", [batch, len(widths)], make, flops=2.0 * batch * products)
