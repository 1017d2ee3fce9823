"""The curve of share against time that docs/inversion.md shows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "inversion"))
from found_over_time import MINUTES, RESULTS, curve, searches


def test_only_victims_that_are_found_raise_the_curve():
    rows = [{"seconds": 90, "psnr_db": 50}, {"seconds": 30, "psnr_db": 39}, {"seconds": 60, "psnr_db": 40}]
    assert curve(rows) == ([0, 1, 1.5, 1.5], [0, 1 / 3, 2 / 3, 2 / 3])


@pytest.mark.skipif(not RESULTS.exists(), reason="the records lie beside the sources")
def test_every_record_ends_within_the_picture():
    """A curve ends at the share that the documents give."""
    kinds = searches(RESULTS)
    assert {len(rows) for rows in kinds.values()} >= {20, 100}
    for rows in kinds.values():
        minutes, shares = curve(rows)
        assert (
            minutes == sorted(minutes)
            and minutes[-1] <= MINUTES
            and shares[-1] == sum(row["psnr_db"] >= 40 for row in rows) / len(rows)
        )
