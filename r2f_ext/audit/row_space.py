"""Route `adapter_rowspace` in an audit: taken where it applies, and why not where it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from r2f_ext.errors import R2FError
from r2f_ext.inversion.adapter_rowspace import invert_adapter_rowspace
from r2f_ext.inversion.identifiability import FIRST_QKV, identifiability
from r2f_ext.models import InitialA, forgot_start, initial_from_folder, initial_from_seed, untouched_a
from r2f_ext.types import LoraUpdate, Reconstruction, Target


@dataclass(frozen=True)
class RowSpace:
    """What the route made of V adapters, or why it was refused.

    Attributes:
        found: images [V, c, h, w], `details` those of the least certain adapter; None where refused.
        why: one sentence.
    """

    found: Reconstruction | None
    why: str


def run_row_space(
    target: Target, adapters: list[LoraUpdate], initial: str | None = None, seed: int | None = None
) -> RowSpace:
    """Invert adapters from the movement of A, or from B alone after one step, where the count allows it.

    Args:
        initial: a PEFT folder saved before training.
        seed: of torch right before PEFT drew A_0. Neither: common seeds are tried.

    Raises:
        R2FError: `initial` or `seed` was given and does not belong to the adapters.
    """
    one_step = all(untouched_a(update) for update in adapters)
    verdict = identifiability(target.base, adapter=target, steps=1 if one_step else 2)["adapter_rowspace"]
    if not verdict.identifiable:
        return RowSpace(None, verdict.why)
    if one_step and initial is None and seed is None:
        start: InitialA | None = InitialA({}, "the adapter itself, as after one step", 1.0)
    else:
        start = find_initial(target, adapters[0], initial, seed)
    if start is None and all(forgot_start(one.a[FIRST_QKV]) for one in adapters):
        start = InitialA({}, "nowhere: weight decay has made A forget it", 0.0)
    if start is None:
        why = "A before the first step is unknown: no common seed draws it; pass --initial FOLDER or --a0-seed N."
        return RowSpace(None, f"Not run: {why}")
    try:
        a0 = [start.a or (one.a if one_step else None) for one in adapters]
        parts = [invert_adapter_rowspace(target, replace(one, a0=a)) for one, a in zip(adapters, a0, strict=True)]
    except R2FError as error:
        return RowSpace(None, f"Not run: {error}")
    worst = min(parts, key=lambda part: part.details["expected_psnr_db"])
    why = f"A0 from {start.source}; {worst.why}"
    images, seconds = torch.cat([part.images for part in parts]), sum(part.seconds for part in parts)
    return RowSpace(Reconstruction(worst.route, images, None, why, seconds, worst.details), why)


def find_initial(target: Target, update: LoraUpdate, initial: str | None, seed: int | None) -> InitialA | None:
    """A_0 from a folder, from one seed, or from the common seeds; None where none of the latter fits."""
    if initial is not None:
        return initial_from_folder(initial, target, update)
    if seed is None:
        return initial_from_seed(target, update)
    found = initial_from_seed(target, update, [seed])
    if found is None:
        raise R2FError(f"--a0-seed {seed} does not draw the A that this adapter started from ({FIRST_QKV}).")
    return found
