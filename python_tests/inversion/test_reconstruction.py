"""Closed-form reconstructions of single victims, combined."""

from math import log10

import pytest
import torch

from r2f_ext.inversion.exactness import CEILING_DB, EXACT_DB
from r2f_ext.inversion.pixel_axes import SAFETY
from r2f_ext.inversion.reconstruction import stack_victims
from r2f_ext.types import Reconstruction


def one(error: float, seconds: float = 1.0) -> Reconstruction:
    """A victim whose image is expected to be wrong by `error` on average."""
    details = {"expected_error": error, "expected_psnr_db": -20 * log10(error)}
    return Reconstruction("route", torch.full((1, 3, 4, 4), error), None, f"Off by {error}.", seconds, details)


def test_the_worst_victim_speaks_for_all_and_each_keeps_its_own_figures() -> None:
    done: list[int] = []
    found = stack_victims(
        (one(error, seconds) for error, seconds in ((1e-4, 1.0), (0.1, 2.0), (1e-3, 4.0))), done.append
    )
    assert found.images[:, 0, 0, 0].tolist() == pytest.approx([1e-4, 0.1, 1e-3])
    assert found.why == "Off by 0.1." and found.details == one(0.1).details and found.seconds == 7.0
    assert found.per_victim["expected_error"].tolist() == [1e-4, 0.1, 1e-3] and done == [1, 1, 1]


def test_the_bound_leaves_a_margin_and_is_claimed_only_where_it_is_exact() -> None:
    limit = 10 ** (-EXACT_DB / 20) / SAFETY  # the error whose bound is EXACT_DB
    per_victim = stack_victims([one(1e-9), one(0.9 * limit), one(1.1 * limit)]).per_victim
    assert per_victim["exact"].tolist() == [1.0, 1.0, 0.0]
    assert per_victim["bound_db"][:2].tolist() == pytest.approx([CEILING_DB, EXACT_DB - 20 * log10(0.9)])
    assert per_victim["bound_db"][2].isnan()


def test_nothing_is_exact_where_there_is_doubt() -> None:
    found = stack_victims([one(1e-9)], doubt="of dropout")
    assert found.doubt == "of dropout"
    assert found.per_victim["exact"].tolist() == [0.0] and found.per_victim["bound_db"].isnan().all()
