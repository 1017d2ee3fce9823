"""Whether A [r, d_in] can be, or is to the last bit, a draw of PEFT's initialisation.

PEFT's default start is `kaiming_uniform_(a=sqrt(5))`, uniform within 1 / sqrt(d_in); "gaussian" is normal with standard
deviation 1 / r (peft.tuners.lora.layer, `reset_lora_parameters`); EVA's rows are right singular vectors of the layer's
inputs (Paischer et al. 2024), hence orthogonal.

torch fills float32 tensors from 24 random bits per entry, k = 0 ... 2^24 - 1. A uniform entry is 2 bound k / 2^24 less
bound. Below bound / 16 at most one float32 in eight has that form, so that entries that have moved are recognised. A
normal pair is (r cos t, r sin t) with r^2 = -2 log(1 - k / 2^24) (Box and Muller 1958), so that exp(-r^2 / 2) 2^24 is a
whole number, as far as float32 shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import pi, sqrt

import torch
from torch import Tensor, nn

from r2f_ext.models.storage import storage_dtype

BITS = 2.0**24
NEAR_ZERO = 1 / 16  # share of the uniform range in which entries are compared with torch's draws
TESTED = 16  # fewest entries whose form shows anything
LARGEST = 9.0  # standard deviations: no generator of torch reaches them
UNLIKELY = 8.0  # standard deviations of a mean or a variance from that of a draw
READABLE = 0.03  # bound on -u log u, where float32 still shows u 2^24 to a fifth
TESTED_PAIRS, IN_PHASE = 60, 0.5  # the mean cosine of fewer than 60 random phases may pass 0.5 by chance
ORTHOGONAL = 1e-3
# A has forgotten its start when its smallest singular value is below this fraction of what a random start would have.
FORGOTTEN = 1e-2


class Trace(IntEnum):
    """What A shows of a movement since its start; the largest of several layers holds for all of them."""

    NONE = 0  # it is its start to the last bit
    POSSIBLE = 1  # it can be its start; smaller movements than the judged property shows are possible
    MOVED = 2  # it cannot be its start


def uniform_bound(d_in: int) -> float:
    """The bound of PEFT's default start, computed as torch's `kaiming_uniform_` does."""
    return sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", sqrt(5)) / sqrt(d_in))


def in_uniform_range(a: Tensor) -> bool:
    """Whether every entry of A [r, d_in] lies in the range of the default start, rounded to A's storage precision."""
    reach = torch.tensor(uniform_bound(a.shape[1]) * (1 + 1e-6), dtype=torch.float64)
    return float(a.abs().max()) <= float(reach.to(storage_dtype([a])))


def uniform_trace(factors: Sequence[Tensor]) -> Trace:
    """The trace in A [r, d_in] of several layers that PEFT's default start drew."""
    if any(not in_uniform_range(a) or forgot_start(a) for a in factors):
        return Trace.MOVED
    if storage_dtype(factors) is not torch.float32:
        return Trace.POSSIBLE
    drawn = torch.cat([_drawn_uniform(a.float()) for a in factors])
    return Trace.NONE if len(drawn) >= TESTED and drawn.all() else Trace.POSSIBLE


def _drawn_uniform(a: Tensor) -> Tensor:
    """Whether torch's float32 `uniform_` draws the entries of A in (0, bound / 16): bool [their number].

    Above zero CPU and CUDA draw the same numbers. Compilers may or may not fuse the product and the sum.
    """
    bound = torch.tensor(uniform_bound(a.shape[1]), dtype=torch.float32, device=a.device)
    entries = a[(a > 0) & (a < NEAR_ZERO * bound)]
    nearest = ((entries.double() + bound.double()) / (2 * bound.double()) * BITS).round()
    drawn = torch.zeros_like(entries, dtype=torch.bool)
    for k in (nearest - 1, nearest, nearest + 1):
        fused = (k / BITS * (2 * bound.double()) - bound.double()).float()
        drawn |= (entries == fused) | (entries == (k / BITS).float() * (2 * bound) - bound)
    return drawn


def gaussian_trace(factors: Sequence[Tensor]) -> Trace:
    """The trace in A [r, d_in] of several layers that PEFT's "gaussian" start drew, with standard deviation 1 / r."""
    units = [a.double() * len(a) for a in factors]
    together = torch.cat([unit.flatten() for unit in units])
    spread = sqrt(len(together) / 2) * abs(float(together.square().mean()) - 1)
    offset = sqrt(len(together)) * abs(float(together.mean()))
    if float(together.abs().max()) > LARGEST or max(spread, offset) > UNLIKELY:
        return Trace.MOVED
    if storage_dtype(factors) is not torch.float32:
        return Trace.POSSIBLE
    phases = torch.cat([_normal_phases(unit) for unit in units])
    in_phase = len(phases) >= TESTED_PAIRS and float((2 * pi * phases).cos().mean()) > IN_PHASE
    return Trace.NONE if in_phase else Trace.POSSIBLE


def _normal_phases(unit: Tensor) -> Tensor:
    """exp(-r^2 / 2) 2^24 of the pairs of entries that torch's CPU generator draws together, where it is readable.

    torch transforms blocks of 16 entries, each with the one 8 later, and draws the last 16 anew if blocks do not fit.
    """
    flat = unit.flatten()
    flat = flat[: len(flat) - 16] if len(flat) % 16 else flat
    pairs = flat[: len(flat) // 16 * 16].view(-1, 2, 8)
    u = (-pairs.square().sum(1) / 2).exp().flatten()
    return u[-u * u.clamp_min(1e-30).log() < READABLE] * BITS


def eva_trace(factors: Sequence[Tensor]) -> Trace:
    """The trace in A [r, d_in] of several layers that EVA started: whether its rows are still orthogonal."""
    for a in factors:
        rows = nn.functional.normalize(a.double(), dim=1)
        if float((rows @ rows.mT).triu(1).abs().max()) > ORTHOGONAL:
            return Trace.MOVED
    return Trace.POSSIBLE


def forgot_start(a: Tensor) -> bool:
    """Whether weight decay has shrunk some singular values of A [r, d_in] far below those of a random start.

    The smallest singular value of a random A is about (1 - sqrt(r / d_in)) / (1 + sqrt(r / d_in)) of its largest
    (Marchenko and Pastur 1967).
    """
    if not torch.isfinite(a).all():
        return False
    singular = torch.linalg.svdvals(a.double())
    return bool(singular[-1] < FORGOTTEN * (1 - (len(a) / a.shape[1]) ** 0.5) * singular[0])
