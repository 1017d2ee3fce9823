"""How many tokens a base makes of one image, measured rather than derived from an architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2f_ext.types import BaseModel


@torch.no_grad()
def tokens_of(base: BaseModel) -> int:
    """The most tokens of one image that a Linear layer of the base reads, by one forward pass of a black image.

    For a Vision Transformer these are the patches and the class, distillation and register tokens; windowed attention
    counts the tokens of all windows; a convolutional network whose only Linear layer is its head has 1.
    """
    counts = [0]

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts.append(args[0].numel() // args[0].shape[-1])

    linear = [module for module in base.model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(count) for module in linear]
    try:
        like = next(base.model.parameters())
        base.model(base.normalize(torch.zeros(1, *base.input_shape, dtype=like.dtype, device=like.device)))
    finally:
        for handle in handles:
            handle.remove()
    return max(counts)
