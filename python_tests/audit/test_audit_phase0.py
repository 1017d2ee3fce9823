"""The ceiling's figures."""

import pytest

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.phase0 import run_phase0


def test_figures_are_those_of_the_pictures(embedded, private):
    figures, pictures = run_phase0(embedded, private)
    assert [f["route"] for f in figures] == [route for route, _ in pictures] == ["patch_position", "attention_rowspace"]
    for figure, (_, images) in zip(figures, pictures, strict=True):
        psnr = psnr_db(images, private.batch(slice(None)))
        assert figure["psnr_db_mean"] == pytest.approx(float(psnr.mean()))
        assert figure["psnr_db_min"] == pytest.approx(float(psnr.min()))
        assert figure["psnr_db_mean"] > 40 and figure["seconds"] > 0 and figure["why"].endswith(".")
