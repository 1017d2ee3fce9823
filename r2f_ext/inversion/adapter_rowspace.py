"""Closed form from an adapter alone: the change of A spans the inputs of the adapted layer (docs/methods.md, 3c, 6).

With plain SGD, A_T - A_0 is a sum of terms B_t^T D_t^T X_t, so its rows lie in the span of block 0's qkv inputs and the
solve of `attention_rowspace` applies. It needs a rank of at least the number of patch tokens and T >= 2: the
first step leaves A unchanged, because B_0 = 0. The row space of B_1 = c D^T (X A_0^T) in R^r also gives r - tokens
equations, with the directions A_0^T q for q orthogonal to it. Momentum preserves the span; Adam does not. With weight
decay A_T - c A_0 lies in the span, and c can be computed from A_T and A_0 if the rank exceeds the number of tokens.

Long training with weight decay removes A_0: at a stationary point decay * A = -scale * B^T D^T X, so A itself lies in
the span and A_0 is not needed. But decay of both factors is a nuclear-norm penalty on B A (Srebro, Rennie and Jaakkola,
NeurIPS 2004): directions that the loss does not support shrink as fast as A_0, and the few that remain are not enough
for an image. (Jang et al., ICML 2024, and DAGER, Petrov et al., NeurIPS 2024, also study rank and span of LoRA.)
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.attention_rowspace import (
    check_rows,
    equilibrate_rows,
    solve_from_rows,
    solve_patches,
    solve_prior,
    token_map,
    weighted_directions,
)
from r2f_ext.inversion.counting import closed_form_verdict, count_on, rowspace_refusal
from r2f_ext.inversion.exactness import storage_precision
from r2f_ext.inversion.geometry import FIRST_QKV, ViTGeometry, base_geometry
from r2f_ext.inversion.patches import to_image
from r2f_ext.inversion.route import Verdict
from r2f_ext.models import forgot_start
from r2f_ext.types import BaseModel, LoraUpdate, Reconstruction, Target

ROUTE = "adapter_rowspace"
CLUSTER_GAP = 10  # distance of a cluster of eigenvalues below 1, in cluster widths, that indicates weight decay


def count_adapter_rowspace(base: BaseModel, adapter: Target | None, steps: int | None, batch: int = 1) -> Verdict:
    """Compare the unknowns of one patch with the equations that A's change, or B after one step, gives for it.

    Args:
        adapter: the adapted layers; None: there is no adapter, which refuses the route.
        steps: the victim's T; None counts as several.
        batch: images of the group.
    """

    def count(g: ViTGeometry) -> Verdict:
        unknowns, refusal = g.patch_numbers + g.norm_scales, rowspace_refusal(g, batch)
        if adapter is None or FIRST_QKV not in adapter.without_saved().names:
            nothing = f"no adapter on {FIRST_QKV}"
            return closed_form_verdict(ROUTE, unknowns, 0, nothing, "", f"0 equations for {unknowns} unknowns a patch")
        rank = adapter.layer(FIRST_QKV).rank
        if steps == 1:
            equations, size = max(rank - g.tokens, 0), f"rank {rank}"
            note = "at T = 1 A has not moved, as B starts at 0, and only B's row space is left"
            needs = f"At one plain SGD step with known A0, {note}"
            if refusal is None and unknowns > equations:
                refusal = note
        else:
            equations, size = max(g.width - g.tokens, 0) if rank >= g.patch_tokens else 0, f"width {g.width}"
            needs = "Needs known A0 and T >= 2 plain SGD steps on one image, stored precisely"
            if refusal is None and rank < g.patch_tokens:
                refusal = f"rank {rank} cannot hold the span of {g.patch_tokens} patch tokens"
            elif refusal is None and unknowns > equations:
                refusal = "too few directions are orthogonal to all tokens"
        numbers = f"{unknowns} unknowns a patch against {equations} equations, {size} less {g.tokens} tokens"
        return closed_form_verdict(ROUTE, unknowns, equations, refusal, needs, numbers)

    return count_on(ROUTE, base, count)


def invert_adapter_rowspace(target: Target, update: LoraUpdate) -> Reconstruction:
    """Solve for the image that one adapter was trained on, one image at every step.

    The result depends on the storage precision of A, whose change is a small difference of large numbers: float64
    factors give the image, float32 factors often only a blurred one (`details` holds the expected error).

    Args:
        target: the base and its adapted layers; `blocks.0.attn.qkv` must be one of them.
        update: factors after T steps, with A_0 (`a0`). An unchanged A means T = 1. A_0 may be missing only
            if weight decay has removed it from A.

    Returns:
        A reconstruction with images [1, c, h, w]; `why` and `details` name rank, tokens, storage precision and the
        PSNR to be expected.

    Raises:
        R2FError: the count refuses the route, A_0 is unknown yet still in A, or factors are not finite or untrained.
    """
    started = time.perf_counter()
    a, a0 = update.a.get(FIRST_QKV), (update.a0 or {}).get(FIRST_QKV)
    if a is not None and a0 is None and not forgot_start(a):
        raise R2FError(f"{ROUTE} needs A before the first step (a0) of {FIRST_QKV}: its rows are A's movement.")
    one_step = a is not None and a0 is not None and _only_shrunk(a, a0)
    verdict = count_adapter_rowspace(target.base, target, steps=1 if one_step else 2)
    if not verdict.identifiable:
        raise R2FError(f"{ROUTE} is refused: {verdict.why}")
    geometry = base_geometry(target.base)
    assert a is not None  # or the count refuses
    a = a.to(target.base.device, torch.float64)
    start = torch.zeros_like(a) if a0 is None else a0.to(a)
    stored = storage_precision(update.b[FIRST_QKV] if one_step else update.a[FIRST_QKV])
    if one_step:
        b = update.b[FIRST_QKV].to(start)
        check_rows(b, f"B of {FIRST_QKV}")
        image, details = _from_b(target.base, geometry, start, b, stored.eps)
    else:
        check_rows(a - start, f"the movement of A of {FIRST_QKV}")
        movement = a - remaining_share(a, start, geometry.tokens) * start
        rounding = stored.eps * float(a.norm() / movement.norm())
        image, details = solve_from_rows(target.base, geometry, movement, rounding)
    details |= {"lora_rank": float(len(start)), "tokens": float(geometry.tokens), "storage_bits": float(stored.bits)}
    left = "" if a0 is not None else f", of which weight decay has left {details['rank']:.0f}"
    why = (
        f"rank {len(start)}{left} against {geometry.tokens} tokens, stored as {stored.dtype}: "
        f"about {details['expected_psnr_db']:.0f} dB to be expected."
    )
    return Reconstruction(ROUTE, image, None, why, time.perf_counter() - started, details)


def _only_shrunk(a: Tensor, a0: Tensor) -> bool:
    """Whether A is a multiple of A_0 up to storage rounding: then there was one step, with B = 0 and weight decay."""
    share = (a * a0).sum() / a0.square().sum()
    return bool((a - share * a0).norm() <= storage_precision(a).eps * a.norm())


def remaining_share(a: Tensor, start: Tensor, tokens: int) -> float:
    """The factor c by which weight decay shrank A_0 in A_T, both [r, d_in], float64; 1 if no decay is detected.

    A_T - c A_0 has rank at most `tokens`, so c is an eigenvalue of A_T pinv(A_0) [r, r] of multiplicity r - tokens. It
    is estimated as the mean of the tightest cluster of that many eigenvalues.
    """
    crowd = len(a) - tokens
    if crowd < 2 or not start.any():
        return 1.0
    eigenvalues = torch.linalg.eigvals(a @ torch.linalg.pinv(start))
    spread, nearest = (eigenvalues[:, None] - eigenvalues).abs().sort(dim=1)
    densest = int(spread[:, crowd - 1].argmin())
    share = float(eigenvalues[nearest[densest, :crowd]].real.mean())
    return share if 1 - share > CLUSTER_GAP * float(spread[densest, crowd - 1]) else 1.0


def _from_b(
    base: BaseModel, geometry: ViTGeometry, start: Tensor, b: Tensor, rounding: float
) -> tuple[Tensor, dict[str, float]]:
    """Image from B_1 [d_out, r] and A_0 [r, d], by directions A_0^T q with q orthogonal to the rows of B_1 and to A_0 t
    for every known token input t."""
    tokens = token_map(base, geometry)
    found = weighted_directions(equilibrate_rows(b), tokens.known @ start.T, geometry.patch_tokens, rounding)
    estimate = solve_patches(tokens, found.weighted @ start, solve_prior(base, geometry, tokens))
    image = to_image(base, estimate.solution[: geometry.patch_numbers].T, geometry.patch, geometry.grid)
    return image, estimate.details(base)
