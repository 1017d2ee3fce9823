"""What the factors themselves show of the training: the steps taken, and whether A still holds its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.models.facts import AdapterFacts
from r2f_ext.types import LoraUpdate

# A has forgotten its start when its smallest singular value is below this fraction of what a random start would have.
FORGOTTEN = 1e-2
NO_BATCH = "The factors do not show how many images a step saw; every figure assumes one."


@dataclass(frozen=True)
class Evidence:
    """What the factors of V adapters of one start show of its recipe.

    Attributes:
        steps: 1 where every A is its start as far as the factors show; None where more steps cannot be excluded.
        start: how A was drawn: "default", or init_lora_weights of the configuration.
        signs_only: |B| is nearly constant, as after the first step of Adam(W): it holds the gradient's signs.
        sentences: what is known and what is not, for the report.
    """

    steps: int | None
    start: str
    signs_only: bool
    sentences: tuple[str, ...]


def evidence_of(updates: Sequence[LoraUpdate], facts: Sequence[AdapterFacts] = ()) -> Evidence:
    """The evidence of V adapters that share one start; `facts`: of their folders, as far as known."""
    one = all(untouched_a(update) for update in updates)
    start = facts[0].init if facts and facts[0].init != "true" else "default"
    said = "A lies in PEFT's initial range, as after one step." if one else "A has left PEFT's initial range."
    return Evidence(1 if one else None, start, False, (said, NO_BATCH))


def untouched_a(update: LoraUpdate) -> bool:
    """Whether every A can still be what PEFT drew: its default start is uniform within 1 / sqrt(d_in).

    After one step A equals its start, because grad_A = 0 while B = 0 (docs/methods.md, section 1). Later steps move
    some entries out of that range, or weight decay shrinks all of them.
    """
    return all(
        float(a.abs().max()) <= a.shape[1] ** -0.5 * (1 + 1e-6) and not forgot_start(a) for a in update.a.values()
    )


def forgot_start(a: Tensor) -> bool:
    """Whether weight decay has shrunk some singular values of A [r, d_in] far below those of a random start.

    The smallest singular value of a random A is about (1 - sqrt(r / d_in)) / (1 + sqrt(r / d_in)) of its largest
    (Marchenko and Pastur 1967).
    """
    if not torch.isfinite(a).all():
        return False
    singular = torch.linalg.svdvals(a.double())
    return bool(singular[-1] < FORGOTTEN * (1 - (len(a) / a.shape[1]) ** 0.5) * singular[0])
