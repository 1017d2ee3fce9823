"""Spectra of the audited updates: how many directions of each layer an adapter uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.types import LoraUpdate, Target

ENERGY = 0.99


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one layer's product s B A, over V adapters.

    Attributes:
        largest: median over the adapters of the largest singular value.
        relative: [r], medians of the singular values over the largest of the same adapter, in descending order.
        directions: median number of singular values that hold 99 % of the sum of squares; 0 where s B A = 0.
    """

    largest: float
    relative: list[float]
    directions: int


def spectra_of(target: Target, adapters: list[LoraUpdate]) -> dict[str, Spectrum]:
    """layer -> spectrum of s B A; only the r x r product of the factors' triangles is decomposed, never B A itself."""
    found = {}
    for layer in target.layers:
        values = torch.stack([layer.scale * _singular_values(one.a[layer.name], one.b[layer.name]) for one in adapters])
        largest = values[:, :1]
        relative = torch.where(largest > 0, values / largest, 0.0)
        # Counted from the small end, so that a spectrum with one direction gives 1 whatever the rounding.
        rest = values.square().flip(1).cumsum(1)
        directions = (rest > (1 - ENERGY) * rest[:, -1:]).sum(1)
        found[layer.name] = Spectrum(
            float(largest.quantile(0.5)),
            relative.quantile(0.5, dim=0).tolist(),
            int(directions.double().quantile(0.5)),
        )
    return found


def _singular_values(a: Tensor, b: Tensor) -> Tensor:
    """[r] singular values of b a in float64, from a [r, d_in] and b [d_out, r]."""
    inner = torch.linalg.qr(b.double(), mode="r").R @ torch.linalg.qr(a.double().mT, mode="r").R.mT
    return torch.linalg.svdvals(inner)
