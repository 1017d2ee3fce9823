"""Phase 0: which closed forms run, and their figures."""

import pytest
import timm
import torch
from vit_cases import small_vit, smooth_images

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.phase0 import phase0
from r2f_ext.data import ImageSet
from r2f_ext.errors import R2FError
from r2f_ext.types import BaseModel


def images(count: int, size: int) -> ImageSet:
    return ImageSet("images", (255 * smooth_images(count, size)).round().byte(), torch.arange(count))


def test_figures_are_those_of_the_pictures(embedded, private):
    reports, verdicts = phase0(embedded, private)
    assert [report.figures.route for report in reports] == ["attention_rowspace", "patch_position"]
    for report, floor in zip(reports, (45, 80), strict=True):
        psnr, figures = psnr_db(report.images, private.batch(slice(None))), report.figures
        assert figures.psnr_db_mean == pytest.approx(float(psnr.mean()))
        assert figures.psnr_db_min == pytest.approx(float(psnr.min())) and figures.psnr_db_min >= floor
        assert report.images.dtype == torch.float32 and figures.seconds > 0 and figures.why.endswith(".")
        assert verdicts[figures.route].identifiable


def test_refused_routes_are_left_to_the_verdicts() -> None:
    reports, verdicts = phase0(small_vit(embed_dim=64), images(2, 16))
    assert [r.figures.route for r in reports] == ["patch_position"]
    assert not verdicts["attention_rowspace"].identifiable
    resnet = timm.create_model("resnet10t", num_classes=10).eval().requires_grad_(False)
    base = BaseModel(resnet, "resnet", (3, 32, 32), (0.5,) * 3, (0.5,) * 3, 10)
    assert phase0(base, images(1, 32))[0] == []


def test_works_under_no_grad() -> None:
    with torch.no_grad():
        assert len(phase0(small_vit(), images(1, 16))[0]) == 2


def test_no_image_is_refused() -> None:
    with pytest.raises(R2FError, match="at least one image"):
        phase0(small_vit(), images(0, 16))
