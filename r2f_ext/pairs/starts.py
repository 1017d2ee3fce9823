"""Initial LoRA factors as PEFT draws them, for pairs whose victims do not share one A."""

from __future__ import annotations

import torch
from torch import Tensor

from r2f_ext.data.device import to_device
from r2f_ext.files import seed_of
from r2f_ext.types import Target


def random_a(target: Target, seed: int, first: int, count: int) -> dict[str, Tensor]:
    """A of the victims `first` to `first + count - 1`, name -> [count, r, d_in] float32, each from its own generator.

    PEFT's default start (`reset_lora_parameters`) is Kaiming uniform with a = sqrt(5): uniform within 1 / sqrt(d_in).
    The A of victim p depends only on the seed and p; two victims have the same A with a probability of 2^-32. For a
    saved layer, A is the identity.
    """
    layers = target.without_saved().layers
    sizes = [layer.rank * layer.d_in for layer in layers]
    generators = [torch.Generator().manual_seed(seed_of(f"A/{seed}/{first + p}")) for p in range(count)]
    flat = torch.stack([torch.rand(sum(sizes), generator=each) for each in generators])
    found = {}
    for layer in target.layers:
        if layer.saved:
            found[layer.name] = torch.eye(layer.d_in, device=target.base.device).expand(count, -1, -1)
    for layer, part in zip(layers, flat.split(sizes, dim=1), strict=True):
        uniform = part.unflatten(1, (layer.rank, layer.d_in)).mul(2).sub(1)
        found[layer.name] = to_device(uniform * layer.d_in**-0.5, target.base.device)
    return found
