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
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from r2f_ext.errors import R2FError
from r2f_ext.inversion.counting import closed_form_verdict, count_on, not_shared, rowspace_refusal
from r2f_ext.inversion.geometry import FIRST_QKV, QKV_WEIGHT, ViTGeometry, base_geometry, norms_before_qkv
from r2f_ext.inversion.patch_position import read_gradient
from r2f_ext.inversion.patches import (
    Estimate,
    Prior,
    patch_prior,
    posterior_mean,
    prior_from_images,
    to_image,
)
from r2f_ext.inversion.route import Verdict
from r2f_ext.types import BaseModel, Reconstruction

ROUTE = "attention_rowspace"
# A singular value counts as signal when it exceeds the largest of the noise by this factor.
CLEAR_GAP = 1.2
# Fraction of the tokens' span that may be lost in noise before the weights of all equations are reduced.
TOLERATED_LOSS = 0.25
# Rows of a gradient below this share of the largest are rounding.
NEGLIGIBLE_ROW = 1e-12


def count_attention_rowspace(base: BaseModel, batch: int = 1, shared: Collection[str] | None = None) -> Verdict:
    """Compare the unknowns of one patch with the number of directions orthogonal to all tokens.

    Args:
        batch: images of the group; shared: parameters whose gradients are observed, None: all.
    """

    def count(g: ViTGeometry) -> Verdict:
        unknowns = g.patch_numbers + g.norm_scales
        spanned = batch * g.patch_tokens + g.prefix_tokens
        equations = max(g.width - spanned, 0)
        refusal = rowspace_refusal(g, batch)
        if refusal is None and unknowns > equations:
            refusal = "too few directions are orthogonal to all tokens"
        return closed_form_verdict(
            ROUTE,
            unknowns,
            equations,
            refusal or not_shared(shared, QKV_WEIGHT),
            f"Needs the exact gradient of {FIRST_QKV} for one image",
            f"{unknowns} unknowns a patch against {equations} equations, width {g.width} less {spanned} tokens",
        )

    return count_on(ROUTE, base, count)


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


def invert_attention_rowspace(
    base: BaseModel, gradients: dict[str, Tensor], prior_images: Tensor | None = None
) -> Reconstruction:
    """Solve for the image of a batch-1 gradient.

    Args:
        base: a timm VisionTransformer with p^2 c + 1 <= d - tokens.
        gradients: parameter name -> exact gradient; reads `blocks.0.attn.qkv.weight` [3d, d], any float dtype.
        prior_images: public images [n, c, h, w] in [0, 1] similar to the victim's, which define the prior; it has an
            effect only in directions hidden by noise. None: a prior of smooth gray patches.

    Returns:
        A reconstruction with images [1, c, h, w]; `details` as in `solve_from_rows`.

    Raises:
        R2FError: the count refuses the route, or the gradient is missing, misshapen, not finite or zero.
    """
    started = time.perf_counter()
    verdict = count_attention_rowspace(base)
    if not verdict.identifiable:
        raise R2FError(f"{ROUTE} is refused: {verdict.why}")
    geometry = base_geometry(base)
    rows = read_gradient(base, gradients, QKV_WEIGHT)
    rounding = torch.finfo(gradients[QKV_WEIGHT].dtype).eps
    image, details = solve_from_rows(base, geometry, rows, rounding, prior_images)
    return Reconstruction(ROUTE, image, None, verdict.why, time.perf_counter() - started, details)


def equilibrate_rows(rows: Tensor) -> Tensor:
    """Scale every row to unit norm. The span does not change, and rounding errors become equally large in all rows, so
    that small singular values rise above them (about 12 dB on the embedded base)."""
    size = rows.norm(dim=1, keepdim=True)
    large = size[:, 0] > NEGLIGIBLE_ROW * size.max()
    return rows[large] / size[large]


@torch.no_grad()
def token_map(base: BaseModel, geometry: ViTGeometry) -> TokenMap:
    """Read `TokenMap` off the base's own parameters, in float64."""
    model: Any = base.model
    weight = model.patch_embed.proj.weight
    blank = weight.new_zeros(1, geometry.channels, *(p * g for p, g in zip(geometry.patch, geometry.grid, strict=True)))
    tokens = model._pos_embed(model.patch_embed(blank))[0].double()
    prefix, offset = tokens[: geometry.prefix_tokens], tokens[geometry.prefix_tokens :]
    linear = weight.double().flatten(1).T
    gray = offset + patch_prior(base, geometry.patch).mean[:, 0] @ linear
    shifts = offset.new_zeros(0, geometry.width)
    typical: list[float] = []
    scale = 1.0
    for module in norms_before_qkv(model) or ():
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


def solve_from_rows(
    base: BaseModel,
    geometry: ViTGeometry,
    rows: Tensor,
    rounding: float,
    prior_images: Tensor | None = None,
    batch: int = 1,
) -> tuple[Tensor, dict[str, float]]:
    """Image [1, c, h, w] from vectors rows [m, d], float64, that span block 0's qkv inputs up to noise.

    Rows are scaled to unit norm first if their noise is proportional to their norm (rounding), and not if the noise is
    equally large in all rows.

    Args:
        rounding: relative error of a row's numbers as they were stored.
        prior_images: as in `invert_attention_rowspace`.
        batch: images whose inputs span the rows; for two or more, one (poor) estimate stands for all of them.

    Returns:
        image, details: rank (how many of the N patch tokens exceed the noise), the N-th and the next singular value
        relative to the first, the equations' noise, the expected error of a model input and the PSNR in dB that
        corresponds to it.
    """
    tokens = token_map(base, geometry)
    prior = solve_prior(base, geometry, tokens, prior_images)
    count = batch * geometry.patch_tokens
    found = weighted_directions(rows, tokens.known, count, rounding)
    if _noise_follows_rows(rows, found, count):
        found = weighted_directions(equilibrate_rows(rows), tokens.known, count, rounding)
    best = solve_patches(tokens, found.weighted, prior, _buried(found.clear, count))
    image = to_image(base, best.solution[: geometry.patch_numbers].T, geometry.patch, geometry.grid)
    relative = (found.singular / found.singular[0]).tolist() + [0.0] * (count + 1)
    details = {
        "rank": float(found.clear),
        "last_kept": relative[count - 1],
        "first_dropped": relative[count],
        **best.details(base),
    }
    return image, details


def _noise_follows_rows(rows: Tensor, found: Directions, count: int) -> bool:
    """Whether the noise of the rows is closer to proportional to their norms than to constant."""
    noise = (rows @ found.weighted[count:].mT).norm(dim=1)
    size = rows.norm(dim=1)
    large = (size > NEGLIGIBLE_ROW * size.max()) & (noise > 0)
    if len(rows) <= count or large.sum() < 2:
        return False
    return bool((noise[large] / size[large]).log().std() < noise[large].log().std())


def _buried(clear: int, count: int) -> float:
    """Fraction of the `count` tokens' span that is lost in noise; small losses, which the weights absorb, give 0."""
    lost = 1 - clear / count
    return min(lost, max(0.0, 2 * (lost - TOLERATED_LOSS)))


@dataclass(frozen=True)
class Directions:
    """Directions of R^d, each weighted by the confidence that it is orthogonal to the rows' span.

    Attributes (float64):
        weighted: [q, d], orthogonal to each other and to the known inputs; norm 1 for directions of pure noise.
        singular: [min(m, q)], singular values of the rows outside the known part, descending.
        clear: number of singular values above the noise, at most the number of patch tokens.
        floor: noise level of the singular values.
    """

    weighted: Tensor
    singular: Tensor
    clear: int
    floor: float


def weighted_directions(rows: Tensor, known: Tensor, count: int, rounding: float) -> Directions:
    """Weigh every direction outside `known` [k, d] by its singular value in rows [m, d].

    The rows are D^T T plus noise, and T has `count` unknown rows. Along a right singular vector v_i of singular
    value s_i the tokens have size max(s_i, noise), since T v_i = pinv(D^T)(s_i u_i - noise v_i). The equation
    v_i^T t = 0 therefore has weight noise / max(s_i, noise). If the spectrum has a gap, this acts as a cut-off there;
    otherwise no rank has to be chosen.
    """
    outside = complement(known)
    _, singular, right = torch.linalg.svd(rows @ outside, full_matrices=outside.shape[1] > len(rows))
    entry = max(rounding * rows.square().mean().sqrt().item(), torch.finfo(torch.float64).eps * singular[0].item())
    clear, entry = _noise_level(singular, (len(rows), outside.shape[1]), count, entry)
    floor = entry * len(rows) ** 0.5
    size = torch.cat([singular, singular.new_zeros(len(right) - len(singular))]).clamp_min(floor)
    return Directions((floor / size)[:, None] * (right @ outside.T), singular, clear, floor)


def _noise_level(singular: Tensor, shape: tuple[int, int], count: int, least: float) -> tuple[int, float]:
    """How many of the first `count` singular values of a matrix of this shape are signal, and one entry's noise.

    White noise has singular values of at most about entry (sqrt(m) + sqrt(q)) (Marchenko and Pastur). The two figures
    are computed in turn, starting from `count` signal values; the noise estimate only grows, so the loop ends.
    """
    clear, entry = min(count, len(singular)), least
    while True:
        m, q = shape[0] - clear, shape[1] - clear
        if m > 0 and q > 0 and clear < len(singular):
            entry = max(entry, (singular[clear:].square().sum() / (m * q)).sqrt().item())
        edge = entry * (max(m, 0) ** 0.5 + max(q, 0) ** 0.5)
        seen = int((singular[:clear] > CLEAR_GAP * edge).sum())
        if seen == clear:
            return clear, entry
        clear = seen


def complement(rows: Tensor) -> Tensor:
    """Orthonormal columns [d, d - k] orthogonal to rows [k, d] of full rank k (k may be 0)."""
    return torch.linalg.qr(rows.T, mode="complete").Q[:, len(rows) :]


def solve_prior(base: BaseModel, geometry: ViTGeometry, tokens: TokenMap, images: Tensor | None = None) -> Prior:
    """The patch prior, extended by the norms' scalars: mean and standard deviation are their typical size."""
    patch = patch_prior(base, geometry.patch) if images is None else prior_from_images(base, images, geometry.patch)
    mean = torch.cat([patch.mean, tokens.typical[:, None].expand(-1, patch.mean.shape[1])])
    return Prior(mean, torch.block_diag(patch.root, torch.diag(tokens.typical)))


def solve_patches(tokens: TokenMap, orthogonal: Tensor, prior: Prior, buried: float = 0.0) -> Estimate:
    """Solve all patches at once from weighted directions [q, d] orthogonal to every input: solution [p^2 c + m, N]."""
    system = torch.cat([orthogonal @ tokens.linear, orthogonal @ tokens.shifts.T], dim=1)
    return posterior_mean(system, -(orthogonal @ tokens.offset.T), prior, buried)


def check_rows(rows: Tensor, what: str) -> None:
    """Check that rows are finite and not all zero.

    Raises:
        R2FError: NaN, infinity, or all zero.
    """
    if not torch.isfinite(rows).all():
        raise R2FError(f"{what} holds NaN or infinity: it diverged or is damaged.")
    if not rows.any():
        raise R2FError(f"{what} is all zero: nothing of the image is in it.")
