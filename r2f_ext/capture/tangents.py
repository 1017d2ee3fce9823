"""How captured inputs and output gradients move with the image: forward mode over the reverse pass, many directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from r2f_ext.capture.hooks import _output_as_tokens, as_tokens
from r2f_ext.types import FactoredGradient, Target


def capture_tangents(
    target: Target, images: Tensor, labels: Tensor, directions: Tensor
) -> tuple[FactoredGradient, FactoredGradient]:
    """Factors of one group's gradient, and their derivatives along K directions of its images.

    One reverse pass at the images serves all directions; each direction then costs about three bare passes. The
    derivatives are exact (no differences), so they are as precise as the model's dtype.

    Args:
        images: [b, c, h, w] in [0, 1], one group; labels: [b] int64.
        directions: [K, b, c, h, w], in pixels.

    Returns:
        (gradient, tangents): x[name] [1, b * tokens, d_in] and [K, 1, b * tokens, d_in], delta[name] likewise.
    """
    modules = dict(target.base.model.named_modules())
    chosen = {name: modules[name] for name in target.names}

    def factors(pixels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        def loss(shifts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            inputs: dict[str, Tensor] = {}
            handles = [module.register_forward_hook(_shift(inputs, name, shifts)) for name, module in chosen.items()]
            try:
                return F.cross_entropy(target.base.model(target.base.normalize(pixels)), labels), inputs
            finally:
                for handle in handles:
                    handle.remove()

        # The gradient at a zero added to a layer's output is the gradient at that output.
        deltas, inputs = grad(loss, has_aux=True)(shifts)
        x = {name: _tokens(as_tokens(module, inputs[name])) for name, module in chosen.items()}
        return x, {name: _tokens(_output_as_tokens(module, deltas[name])) for name, module in chosen.items()}

    shifts = _zeros_of_outputs(target, chosen, images)
    (x, delta), (dx, ddelta) = vmap(lambda e: jvp(factors, (images,), (e,)), out_dims=(None, 0))(directions)
    return FactoredGradient(x, delta), FactoredGradient(dx, ddelta)


def _tokens(rows: Tensor) -> Tensor:
    """[samples, tokens, d] of one group -> [1, samples * tokens, d]."""
    return rows.reshape(1, -1, rows.shape[-1])


def _shift(inputs: dict[str, Tensor], name: str, shifts: dict[str, Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs[name] = args[0]
        return output + shifts[name]

    return hook


@torch.no_grad()
def _zeros_of_outputs(target: Target, chosen: dict[str, nn.Module], images: Tensor) -> dict[str, Tensor]:
    shapes: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: shapes.update({name: torch.zeros_like(output)}))
        for name, module in chosen.items()
    ]
    try:
        target.base.model(target.base.normalize(images))
    finally:
        for handle in handles:
            handle.remove()
    return shapes
