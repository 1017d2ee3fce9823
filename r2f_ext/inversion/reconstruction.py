"""Combination of the reconstructions of single victims."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from r2f_ext.progress import Advance
from r2f_ext.types import Reconstruction


def stack_victims(parts: Iterable[Reconstruction], advance: Advance = lambda victims: None) -> Reconstruction:
    """Combine V reconstructions of one victim each: seconds are summed, `details` are stacked into `per_victim`.

    Returns:
        a reconstruction of V victims; `why` and `details` are those of the first victim with the largest
        `expected_error`.

    Args:
        advance: called with 1 after each victim.
    """
    found = []
    for part in parts:
        found.append(part)
        advance(1)
    worst = max(found, key=lambda part: part.details["expected_error"])
    return Reconstruction(
        worst.route,
        torch.cat([part.images for part in found]),
        None,
        worst.why,
        sum(part.seconds for part in found),
        worst.details,
        per_victim={
            key: torch.tensor([part.details[key] for part in found], dtype=torch.float64) for key in worst.details
        },
    )
