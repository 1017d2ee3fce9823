"""Phase 0 closed form: the image from the row space of block 0's qkv gradient.

The rows of the gradient D^T T span the layer's inputs t_n (the fact that DAGER, Petrov et al., NeurIPS 2024,
tests tokens against; APRIL, Lu et al., CVPR 2022, solves attention inputs in closed form). Those inputs are
t_n = norm(E x_n + e + p_n), so that for every q orthogonal to the span, with LayerNorm's unknown scale s_n,

    q^T (gamma o C E) x_n + s_n q^T beta = -q^T (gamma o C (e + p_n))

is linear in the patch x_n and s_n: one small least-squares problem a patch, all with the same matrix.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r2f_ext.errors import R2FError
from r2f_ext.inversion.identifiability import FIRST_QKV, ViTGeometry, identifiability, vit_geometry
from r2f_ext.inversion.patch_position import read_gradient
from r2f_ext.inversion.patches import Estimate, Prior, patch_prior, posterior_mean, to_image
from r2f_ext.types import BaseModel, Reconstruction

ROUTE = "attention_rowspace"
QKV_WEIGHT = f"{FIRST_QKV}.weight"
# The spectrum falls at least this much after its last signal value where the gradient is precise.
CLEAR_GAP = 10.0
# Ranks tried, as fractions of the patch tokens, where it does not.
RANK_FRACTIONS = (1.0, 0.97, 0.93, 0.88, 0.8, 0.7, 0.6, 0.45)
# Rows of a gradient below this share of the largest are rounding.
NEGLIGIBLE_ROW = 1e-12


@dataclass(frozen=True)
class TokenMap:
    """How block 0's qkv inputs follow from patches: scale_n t_n = linear x_n + offset_n + sum_k s_nk shifts_k.

    Attributes (float64):
        linear: [d, p^2 c].
        offset: [N, d].
        shifts: [m, d], what the norms add, each with an unknown positive scalar s_nk per token.
        typical: [m], a typical size of those scalars.
        known: [prefix, d], inputs of the prefix tokens, which hold nothing of the image.
    """

    linear: Tensor
    offset: Tensor
    shifts: Tensor
    typical: Tensor
    known: Tensor


def invert_attention_rowspace(base: BaseModel, gradients: dict[str, Tensor]) -> Reconstruction:
    """Solve for the image of a batch-1 gradient.

    Args:
        base: a timm VisionTransformer with p^2 c + 1 <= d - tokens.
        gradients: parameter name -> exact gradient; reads `blocks.0.attn.qkv.weight` [3d, d], any float dtype.

    Returns:
        A reconstruction with images [1, c, h, w]; `details` holds the rank used, the spectrum's last kept and
        first dropped values relative to its first, the equations' noise, and the expected error of a model input.

    Raises:
        R2FError: the count refuses the route, or the gradient is missing, misshapen, not finite or zero.
    """
    started = time.perf_counter()
    verdict = identifiability(base)[ROUTE]
    if not verdict.identifiable:
        raise R2FError(f"{ROUTE} is refused: {verdict.why}")
    geometry = vit_geometry(base.model)
    gradient = read_gradient(base, gradients, QKV_WEIGHT)
    image, details = solve_from_rows(base, geometry, equilibrate_rows(gradient))
    return Reconstruction(ROUTE, image, None, verdict.why, time.perf_counter() - started, details)


def equilibrate_rows(rows: Tensor) -> Tensor:
    """Give every row unit norm. The span stays; floats of small rows are as precise as those of large rows,
    so the small singular values rise above the rounding (about 12 dB on the embedded base)."""
    size = rows.norm(dim=1, keepdim=True)
    kept = size[:, 0] > NEGLIGIBLE_ROW * size.max()
    return rows[kept] / size[kept]


@torch.no_grad()
def token_map(base: BaseModel, geometry: ViTGeometry) -> TokenMap:
    """Read `TokenMap` off the base's own parameters, in float64."""
    model: Any = base.model
    weight = model.patch_embed.proj.weight
    blank = weight.new_zeros(1, geometry.channels, *(p * g for p, g in zip(geometry.patch, geometry.grid, strict=True)))
    tokens = model._pos_embed(model.patch_embed(blank))[0].double()
    prefix, offset = tokens[: geometry.prefix_tokens], tokens[geometry.prefix_tokens :]
    linear = weight.double().flatten(1).T
    gray = offset + patch_prior(base, geometry.patch).mean @ linear
    shifts = offset.new_zeros(0, geometry.width)
    typical: list[float] = []
    scale = 1.0
    for module in (model.norm_pre, model.blocks[0].norm1):
        if isinstance(module, nn.Identity):
            continue
        norm = copy.deepcopy(module).double()
        bias = getattr(norm, "bias", None)
        scale *= _norm_scale(norm, gray)
        linear, offset, shifts = (_without_scale(norm, part) for part in (linear, offset, shifts))
        prefix, gray = norm(prefix), norm(gray)
        if bias is not None:
            shifts = torch.cat([shifts, bias.detach()[None]])
            typical.append(scale)
    return TokenMap(linear.T, offset, shifts, offset.new_tensor(typical), prefix)


def _without_scale(norm: Any, rows: Tensor) -> Tensor:
    """A norm's linear part, gamma o C(rows): centring for LayerNorm, none for RMSNorm; no division, no bias."""
    if isinstance(norm, nn.LayerNorm):
        rows = rows - rows.mean(-1, keepdim=True)
    return rows if norm.weight is None else rows * norm.weight


def _norm_scale(norm: nn.Module, rows: Tensor) -> float:
    """A typical divisor of the norm, from tokens of a gray image."""
    if isinstance(norm, nn.LayerNorm):
        return rows.std(-1).mean().item()
    return rows.square().mean(-1).sqrt().mean().item()


def solve_from_rows(base: BaseModel, geometry: ViTGeometry, rows: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Image [1, c, h, w] from vectors rows [m, d], float64, that span block 0's qkv inputs up to noise.

    Known prefix tokens are projected out first, so that only the patch tokens' span is estimated. Where the
    spectrum shows no clear gap after N values, the rank is the one whose solution is expected to err least.
    """
    tokens = token_map(base, geometry)
    outside = complement(tokens.known)
    _, singular, right = torch.linalg.svd(rows @ outside)
    right = right @ outside.T
    prior = solve_prior(base, geometry, tokens)
    best, rank = None, 0
    for candidate in _rank_candidates(singular, geometry.patch_tokens):
        estimate = solve_patches(tokens, right[candidate:], prior)
        if best is None or estimate.uncertainty < best.uncertainty:
            best, rank = estimate, candidate
    assert best is not None
    image = to_image(base, best.solution[: geometry.patch_numbers].T, geometry.patch, geometry.grid)
    relative = (singular / singular[0]).tolist() + [0.0] * 2
    details = {
        "rank": float(rank),
        "last_kept": relative[min(rank, len(singular)) - 1],
        "first_dropped": relative[min(rank, len(singular))],
        "noise": best.noise,
        "expected_error": best.uncertainty,
    }
    return image, details


def complement(rows: Tensor) -> Tensor:
    """Orthonormal columns [d, d - k] orthogonal to rows [k, d] of full rank k (k may be 0)."""
    return torch.linalg.qr(rows.T, mode="complete").Q[:, len(rows) :]


def _rank_candidates(singular: Tensor, patch_tokens: int) -> list[int]:
    ahead = singular[patch_tokens].item() if len(singular) > patch_tokens else 0.0
    if len(singular) >= patch_tokens and singular[patch_tokens - 1] > CLEAR_GAP * ahead:
        return [patch_tokens]
    ranks = {max(1, round(fraction * patch_tokens)) for fraction in RANK_FRACTIONS}
    return sorted((rank for rank in ranks if rank <= len(singular)), reverse=True) or [len(singular)]


def solve_prior(base: BaseModel, geometry: ViTGeometry, tokens: TokenMap) -> Prior:
    """The patch prior, extended by the norms' scalars: their typical size, give or take as much."""
    patch = patch_prior(base, geometry.patch)
    mean = torch.cat([patch.mean, tokens.typical])
    return Prior(mean, torch.block_diag(patch.root, torch.diag(tokens.typical)))


def solve_patches(tokens: TokenMap, orthogonal: Tensor, prior: Prior) -> Estimate:
    """Solve all patches at once from directions orthogonal [q, d] to every input: solution [p^2 c + m, N]."""
    system = torch.cat([orthogonal @ tokens.linear, orthogonal @ tokens.shifts.T], dim=1)
    return posterior_mean(system, -(orthogonal @ tokens.offset.T), prior)


def check_rows(rows: Tensor, what: str) -> None:
    """Refuse rows that hold nothing or not numbers.

    Raises:
        R2FError: NaN, infinity, or all zero.
    """
    if not torch.isfinite(rows).all():
        raise R2FError(f"{what} holds NaN or infinity: it diverged or is damaged.")
    if not rows.any():
        raise R2FError(f"{what} is all zero: nothing of the image is in it.")
