"""The ceiling's figures."""

import pytest

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.phase0 import run_phase0


def test_figures_are_those_of_the_pictures(embedded, private):
    reports, verdicts = run_phase0(embedded, private)
    assert [report.route for report in reports] == ["attention_rowspace", "patch_position"]
    for report in reports:
        psnr = psnr_db(report.images, private.batch(slice(None)))
        assert report.psnr_db_mean == pytest.approx(float(psnr.mean()))
        assert report.psnr_db_min == pytest.approx(float(psnr.min()))
        assert report.psnr_db_mean > 40 and report.seconds > 0 and report.why.endswith(".")
        assert "images" not in report.to_json() and verdicts[report.route].identifiable
