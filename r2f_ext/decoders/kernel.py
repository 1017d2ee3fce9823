"""The kernel on updates that `ridge` and `kernel_ridge` share: half linear, half Gaussian.

The updates of all layers come from the same sample, so each is informative about the others
(docs/pairs-and-decoders.md). The kernel of a layer combines its own update, those of its block and those of all layers.
With unit updates z = u / |u|, the kernel of layer l is
    k_l = (c_l + exp(2 gamma (c_l - 1))) / 2
    c_l = own <z_l, z_l'> + (1 - own) / 2 (mean over the block of <z_m, z_m'> + mean over all layers of <z_m, z_m'>)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

GAMMA = 0.25
OWN = 0.9  # default weight of the layer's own update, in [0, 1]


def kernels(
    products: dict[str, Tensor], names: Sequence[str], own: Callable[[str], float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, k_l [n, m]) for the layers `names`.

    Args:
        products: inner products <z_m, z_m'> [n, m] of all layers.
        own: layer -> weight of its own update, in [0, 1].
    """
    for name, others in mixed_others(list(products), products.__getitem__, names):
        yield name, half_gaussian_(mixed(products[name], others, own(name)))


def mixed(own_products: Tensor, others: Tensor, own: float) -> Tensor:
    """c_l [n, m] from <z_l, z_l'> and the output of `mixed_others` for the layer."""
    return own_products * own + others * (1 - own)


def mixed_others(
    names: Sequence[str], products_of: Callable[[str], Tensor], wanted: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, half the mean over the layer's block plus half the mean over all layers), the second part of c_l.

    The means are over `names`; only the layers in `wanted` are yielded, block by block. The layers of a block share one
    tensor, which is overwritten for the next block.
    """
    if not wanted:
        return
    shared = torch.zeros_like(products_of(names[0]))
    for name in names:
        shared.add_(products_of(name), alpha=0.5 / len(names))
    others = torch.empty_like(shared)
    for block in dict.fromkeys(map(block_of, wanted)):
        members = [name for name in names if block_of(name) == block]
        others.copy_(shared)
        for name in members:
            others.add_(products_of(name), alpha=0.5 / len(members))
        for name in members:
            if name in wanted:
                yield name, others


def block_of(name: str) -> str:
    """The block that a layer belongs to: its module path up to the first number (`blocks.0` of `blocks.0.mlp.fc1`)."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def half_gaussian_(cosine: Tensor) -> Tensor:
    """(c + exp(2 gamma (c - 1))) / 2 of cosines c [n, m], in place; maps 1 to 1."""
    for rows in cosine.split(1000):  # in chunks: a temporary [n, m] would double the peak memory
        rows.add_(torch.exp((rows - 1) * (2 * GAMMA))).div_(2)
    return cosine
