import pytest
import torch

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.studies import Row, Table, World
from r2f_ext.studies.questions.batch import Batch, _assigned_db


def row(metric, values, **keys):
    return Row(keys, metric, tuple(values), min(values), max(values))


def test_batches_are_scored_in_the_best_order():
    images = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.01
    db = _assigned_db(noisy[:, [2, 0, 1]], images)
    torch.testing.assert_close(db, psnr_db(noisy.flatten(0, 1), images.flatten(0, 1)).view(2, 3))


@pytest.mark.parametrize("leaks", [True, False])
def test_conclusions_follow_the_table(leaks):
    table = Table(
        [
            row("recovered", [0.5, 0.9], route="amortised", b=1),
            row("recovered", [0.4, 0.6] if leaks else [0.0, 0.1], route="amortised", b=8),
            row("psnr_db", [18.0, 19.0], route="amortised", gradient="update", b=1),
            row("psnr_db", [12.0, 13.0] if leaks else [18.5, 20], route="class_mean", gradient="update", b=1),
            row("psnr_db", [18.5], route="amortised", gradient="start of the searches", b=1),
            row("psnr_db", [20.0, 21.0] if leaks else [17.0, 18.0], route="amortised_refined", gradient="exact", b=1),
            row("cosine", [0.9, 0.95] if leaks else [0.5, 0.8], decoder="ridge", b=8),
            row("cosine", [0.7, 0.75], decoder="class_mean_gradient", b=8),
        ]
    )
    said = Batch().conclude(World(), table)
    words = " ".join(said)
    assert f"at b = {'1, 8' if leaks else '1'} of 1, 8; at b = {8 if leaks else 1} the share is" in words
    assert ("not clearly nearer to the images than their labels' mean images at b = 1." in words) is not leaks
    assert "matching the exact gradient takes the estimate from 18.5 to" in words
    bad = 0 if leaks else 3
    assert "recovers clearly more" in said[bad]


def test_conclusions_of_tables_with_holes():
    assert Batch().conclude(World(), Table([])) == []
    (one,) = Batch().conclude(World(), Table([Row({"route": "amortised", "b": 1}, "recovered", (1.0,), None, None)]))
    assert one == "`amortised` recovers no clearly larger share of images than chance (5%) at any b."
