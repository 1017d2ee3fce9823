"""How many tokens a base makes of one image, measured rather than derived from an architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2f_ext.capture.hooks import ReplacedOutputs
from r2f_ext.types import BaseModel


@torch.no_grad()
def tokens_of(base: BaseModel) -> int:
    """The most tokens of one image that a Linear layer of the base reads, by one forward pass of a black image.

    For a Vision Transformer these are the patches and the class, distillation and register tokens; windowed attention
    counts the tokens of all windows; a convolutional network whose only Linear layer is its head has 1.
    """
    counts = [0]

    def count(name: str, x: Tensor, output: Tensor) -> Tensor:
        counts.append(x.numel() // x.shape[-1])
        return output

    linear: dict[str, nn.Module] = {
        name: module for name, module in base.model.named_modules() if isinstance(module, nn.Linear)
    }
    like = next(base.model.parameters())
    with ReplacedOutputs(linear, count):
        base.model(base.normalize(torch.zeros(1, *base.input_shape, dtype=like.dtype, device=like.device)))
    return max(counts)
