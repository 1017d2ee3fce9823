"""Closed form from an adapter alone: A's movement spans the inputs of the adapted layer.

With plain SGD, A_T - A_0 is a sum of B_t^T D_t^T X_t, so its rows lie in the span of block 0's qkv inputs and
the solve of `attention_rowspace` applies: rank at least the number of patch tokens, T >= 2 (at T = 1 B was 0
and A has not moved). At T = 1 B_1 is proportional to D^T (X A_0^T): its row space in R^r still gives r - tokens
equations, A_0^T q for q orthogonal to it. Momentum keeps the span; Adam and weight decay do not.
(Jang et al., ICML 2024, and DAGER, Petrov et al., NeurIPS 2024, study rank and span of LoRA from other sides.)
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.attention_rowspace import (
    check_rows,
    complement,
    equilibrate_rows,
    solve_from_rows,
    solve_patches,
    solve_prior,
    token_map,
)
from r2f_ext.inversion.identifiability import FIRST_QKV, ViTGeometry, identifiability, vit_geometry
from r2f_ext.inversion.patches import to_image
from r2f_ext.types import BaseModel, LoraUpdate, Reconstruction, Target

ROUTE = "adapter_rowspace"


def invert_adapter_rowspace(target: Target, update: LoraUpdate) -> Reconstruction:
    """Solve for the image that one adapter was trained on, one image at every step.

    The storage precision of A decides: its movement is a small difference of large numbers, so float64
    factors give the image and float32 factors often only a blur (`details` holds the expected error).

    Args:
        target: the base and its adapted layers; `blocks.0.attn.qkv` must be one of them.
        update: factors after T steps, with A_0 known (`a0`). An A that has not moved means T = 1.

    Returns:
        A reconstruction with images [1, c, h, w].

    Raises:
        R2FError: the count refuses the route, A_0 is unknown, or the factors are not finite or untrained.
    """
    started = time.perf_counter()
    if update.a0 is None or (FIRST_QKV in target.names and FIRST_QKV not in update.a0):
        raise R2FError(f"{ROUTE} needs A before the first step (a0) of {FIRST_QKV}: its rows are A's movement.")
    one_step = FIRST_QKV in target.names and torch.equal(update.a[FIRST_QKV], update.a0[FIRST_QKV])
    verdict = identifiability(target.base, adapter=target, steps=1 if one_step else 2)[ROUTE]
    if not verdict.identifiable:
        raise R2FError(f"{ROUTE} is refused: {verdict.why}")
    geometry = vit_geometry(target.base.model)
    start = update.a0[FIRST_QKV].to(target.base.device, torch.float64)
    if one_step:
        b = update.b[FIRST_QKV].to(start)
        check_rows(b, f"B of {FIRST_QKV}")
        image, details = _from_b(target.base, geometry, start, b)
    else:
        movement = update.a[FIRST_QKV].to(start) - start
        check_rows(movement, f"the movement of A of {FIRST_QKV}")
        # No row scaling here: the error is A's own storage rounding, alike in every row.
        image, details = solve_from_rows(target.base, geometry, movement)
    return Reconstruction(ROUTE, image, None, verdict.why, time.perf_counter() - started, details)


def _from_b(base: BaseModel, geometry: ViTGeometry, start: Tensor, b: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Image from B_1 [d_out, r] and A_0 [r, d]: directions A_0^T q with q orthogonal to B's rows and to A_0 known."""
    tokens = token_map(base, geometry)
    outside = complement(tokens.known @ start.T)
    right = torch.linalg.svd(equilibrate_rows(b) @ outside).Vh
    free = right[geometry.patch_tokens :] @ outside.T
    estimate = solve_patches(tokens, free @ start, solve_prior(base, geometry, tokens))
    image = to_image(base, estimate.solution[: geometry.patch_numbers].T, geometry.patch, geometry.grid)
    return image, {"noise": estimate.noise, "expected_error": estimate.uncertainty}
