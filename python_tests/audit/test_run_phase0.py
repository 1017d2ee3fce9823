"""The ceiling's figures."""

import pytest

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.run import run_phase0


def test_figures_are_those_of_the_pictures(embedded, private):
    ceiling = run_phase0(embedded, private)
    routes = [figure.route for figure in ceiling.figures]
    assert routes == [route for route, _ in ceiling.pictures] == ["attention_rowspace", "patch_position"]
    for figure, (_, images) in zip(ceiling.figures, ceiling.pictures, strict=True):
        psnr = psnr_db(images, private.batch(slice(None)))
        assert figure.psnr_db_mean == pytest.approx(float(psnr.mean()))
        assert figure.psnr_db_min == pytest.approx(float(psnr.min()))
        assert figure.psnr_db_mean > 40 and figure.seconds > 0 and figure.why.endswith(".")
