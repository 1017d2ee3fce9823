"""Combination of the reconstructions of single victims."""

from __future__ import annotations

from collections.abc import Iterable
from math import log10

import torch

from r2f_ext.inversion.exactness import CEILING_DB, EXACT_DB
from r2f_ext.inversion.pixel_axes import SAFETY
from r2f_ext.progress import Advance, no_progress
from r2f_ext.types import Reconstruction


def stack_victims(
    parts: Iterable[Reconstruction], advance: Advance = no_progress, doubt: str | None = None
) -> Reconstruction:
    """Combine V closed-form reconstructions of one victim each.

    Args:
        parts: their `details` hold `expected_error` and `expected_psnr_db`.
        advance: called with 1 after each victim.
        doubt: why none can be called exact, as a clause.

    Returns:
        a reconstruction of V victims: seconds are summed, `why` and `details` are those of the first victim with the
        largest expected error. `per_victim` stacks the details and adds `bound_db`, the expected PSNR less a margin of
        SAFETY in the error, and `exact`, 1 where that is at least EXACT_DB. An expected PSNR below that rests on the
        prior of natural patches too, so it gives no bound: NaN.
    """
    found = []
    for part in parts:
        found.append(part)
        advance(1)
    worst = max(found, key=lambda part: part.details["expected_error"])
    per_victim = {
        key: torch.tensor([part.details[key] for part in found], dtype=torch.float64) for key in worst.details
    }
    bound = (per_victim["expected_psnr_db"] - 20 * log10(SAFETY)).clamp_max(CEILING_DB)
    exact = (bound >= EXACT_DB) & (doubt is None)
    per_victim |= {"bound_db": torch.where(exact, bound, torch.nan), "exact": exact.double()}
    return Reconstruction(
        worst.route,
        torch.cat([part.images for part in found]),
        None,
        worst.why,
        sum(part.seconds for part in found),
        worst.details,
        per_victim=per_victim,
        doubt=doubt,
    )
