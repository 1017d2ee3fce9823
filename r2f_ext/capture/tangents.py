"""Directional derivatives of captured inputs and output gradients with respect to the image: forward mode over the
reverse pass, many directions at once.

torch.func is applied to the model only: the operators of r2f_ext.ops, whose derivatives are registered with autograd,
do not work under its transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from r2f_ext.capture.hooks import ReplacedOutputs, _output_as_tokens, as_tokens
from r2f_ext.graph_optimizer import Traced
from r2f_ext.types import FactoredGradient, Target

Factors = tuple[dict[str, Tensor], dict[str, Tensor]]  # x, delta


class CaptureTangents:
    """Factors of one group's gradient, and their derivatives along K directions of its images.

    One reverse pass at the images serves all directions. The derivatives are exact (no finite differences), so they are
    as precise as the model's dtype. Forward mode over reverse mode is traced once for each shape and dtype (`Traced`).

    Args:
        target: base model and adapted layers.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        modules = dict(target.base.model.named_modules())
        self._modules = {name: modules[name] for name in target.names}
        self._traced = Traced(self._along)

    def __call__(self, images: Tensor, labels: Tensor, directions: Tensor) -> tuple[FactoredGradient, FactoredGradient]:
        """Factors of one group's gradient, and their derivatives along K directions.

        Args:
            images: [b, c, h, w] in [0, 1], one group; labels: [b] int64.
            directions: [K, b, c, h, w], in pixels.

        Returns:
            (gradient, tangents): x[name] [1, b * tokens, d_in] and [K, 1, b * tokens, d_in], delta[name] likewise.
        """
        gradient, moved = self._traced(images, labels, directions)
        return FactoredGradient(*gradient), FactoredGradient(*moved)

    def _along(self, images: Tensor, labels: Tensor, directions: Tensor) -> tuple[Factors, Factors]:
        shifts = _zeros_of_outputs(self.target, self._modules, images)

        def factors(pixels: Tensor) -> Factors:
            def loss(shifts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                inputs: dict[str, Tensor] = {}
                with ReplacedOutputs(
                    self._modules, lambda name, x, output: (inputs.update({name: x}), output + shifts[name])[1]
                ):
                    logits = self.target.base.model(self.target.base.normalize(pixels))
                return F.cross_entropy(logits, labels), inputs

            # The gradient of a zero tensor that is added to a layer's output equals the gradient at that output.
            deltas, inputs = grad(loss, has_aux=True)(shifts)
            x = {name: _tokens(as_tokens(module, inputs[name])) for name, module in self._modules.items()}
            return x, {name: _tokens(_output_as_tokens(m, deltas[name])) for name, m in self._modules.items()}

        def along(direction: Tensor) -> tuple[Factors, Factors]:
            value, moved = jvp(factors, (images,), (direction,))[:2]
            return value, moved

        value_once_and_all_tangents: Any = (None, 0)
        return vmap(along, out_dims=value_once_and_all_tangents)(directions)


def _tokens(rows: Tensor) -> Tensor:
    """[samples, tokens, d] of one group -> [1, samples * tokens, d]."""
    return rows.reshape(1, -1, rows.shape[-1])


@torch.no_grad()
def _zeros_of_outputs(target: Target, modules: dict[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    zeros: dict[str, Tensor] = {}

    def record(name: str, x: Tensor, output: Tensor) -> Tensor:
        zeros[name] = torch.zeros_like(output)
        return output

    with ReplacedOutputs(modules, record):
        target.base.model(target.base.normalize(images))
    return zeros
