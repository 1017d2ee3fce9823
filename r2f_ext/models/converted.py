"""Adapters that hold their own start: PEFT's conversion of PiSSA, OLoRA, CorDA and LoRA-GA to plain LoRA at saving.

`save_pretrained(..., path_initial_model_for_weight_conversion=...)` writes A = [A_T; A_0] and B = [B_T | -B_0] with
twice the rank and the same scale (peft.tuners.lora.model, `subtract_mutated_init`), so that B A = B_T A_T - B_0 A_0 is
the change of the public weight. Both halves are read back here. The residual base with the adapter at its start is the
public base, so that the first step of SGD sees its gradient G there: B_1 - B_0 = -lr s G A_0^T, as in plain LoRA, and
A_1 - A_0 = -lr s B_0^T G on top of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.types import AdaptedLayer, LoraUpdate

SAME = 0.5  # cosine of trained factors with their start; that of two random halves is near 0


def split_start(
    name: str, layers: tuple[AdaptedLayer, ...], update: LoraUpdate
) -> tuple[tuple[AdaptedLayer, ...], LoraUpdate]:
    """Split factors that hold their start; others are returned as they are.

    Args:
        name: of the adapter, for the error.
        layers, update: as the file has them, of twice the rank trained.

    Returns:
        (layers, update): layers of the rank trained; update with a = A_T, b = B_T - B_0, a0 and b0.

    Raises:
        R2FError: B is still its start in every layer.
    """
    if not all(_holds_start(update.a[layer.name], update.b[layer.name]) for layer in layers):
        return layers, update
    a, a0 = _halves(update.a, dim=0)
    b, minus_b0 = _halves(update.b, dim=1)
    moved = {each: b[each] + minus_b0[each] for each in b}
    if not any(each.any() for each in moved.values()):
        raise R2FError(
            f"adapter '{name}' is unchanged: its B is the start that the file holds beside it, so there is nothing to "
            "audit; a trained adapter of the same run may still give images away."
        )
    b0 = {each: -half for each, half in minus_b0.items()} if any(half.any() for half in minus_b0.values()) else None
    trained = tuple(replace(layer, rank=layer.rank // 2) for layer in layers)
    return trained, replace(update, a=a, b=moved, a0=a0, b0=b0)


def _holds_start(a: Tensor, b: Tensor) -> bool:
    """Whether A [2 r, d_in] is twice nearly the same, and B [d_out, 2 r] too with the other sign, or followed by 0."""
    if len(a) % 2 or b.shape[1] != len(a):
        return False
    (a1, a0), (b1, minus_b0) = a.chunk(2), b.chunk(2, dim=1)
    return _cosine(a1, a0) > SAME and (not minus_b0.any() or _cosine(b1, -minus_b0) > SAME)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def _halves(factors: dict[str, Tensor], dim: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    split = {name: factor.chunk(2, dim=dim) for name, factor in factors.items()}
    return {name: halves[0] for name, halves in split.items()}, {name: halves[1] for name, halves in split.items()}
