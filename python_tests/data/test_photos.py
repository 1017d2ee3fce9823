"""Faces and crops of photographs that scikit-image holds."""

import numpy as np
import pytest
import skimage.data
import torch

from r2f_ext.data.photos import MIN_DEVIATION, PRIVATE_PHOTOS, PROXY_PHOTOS, load_faces, photo_crops
from r2f_ext.errors import R2FError


def test_no_photograph_is_both_public_and_private():
    assert not set(PROXY_PHOTOS) & set(PRIVATE_PHOTOS)


def test_the_first_crops_do_not_depend_on_the_count_and_another_seed_gives_others():
    crops = photo_crops(PROXY_PHOTOS, 12, (3, 32, 32), 1)
    assert crops.shape == (12, 3, 32, 32) and crops.dtype == torch.uint8
    assert torch.equal(photo_crops(PROXY_PHOTOS, 5, (3, 32, 32), 1), crops[:5])
    assert not torch.equal(photo_crops(PROXY_PHOTOS, 12, (3, 32, 32), 2), crops)


def test_nearly_uniform_crops_are_drawn_again(monkeypatch):
    """A picture that is uniform but for its left edge."""
    picture = np.full((64, 64), 100, np.uint8)
    picture[:, :4] = 0
    monkeypatch.setattr(skimage.data, "camera", lambda: picture)
    crops = photo_crops(("camera",), 20, (1, 16, 16), 0)
    assert crops.float().flatten(1).std(1).min() > MIN_DEVIATION * 255


def test_crops_as_large_as_the_photograph_are_that_photograph(monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    monkeypatch.setattr(skimage.data, "camera", lambda: picture)
    whole = torch.from_numpy(picture).permute(2, 0, 1)
    for crop in photo_crops(("camera",), 6, (3, 24, 24), 0):
        assert torch.equal(crop, whole) or torch.equal(crop, whole.flip(-1))


def test_faces_are_those_of_scikit_image():
    faces = load_faces()
    assert faces.shape == (100, 1, 25, 25)
    np.testing.assert_allclose(faces[:, 0].numpy() / 255, skimage.data.lfw_subset()[:100], atol=0.5 / 255 + 1e-6)


def test_a_photograph_that_is_not_in_the_wheel_is_named():
    with pytest.raises(R2FError, match="this scikit-image has no 'nonesuch' in its wheel"):
        photo_crops(("nonesuch",), 1, (3, 32, 32), 0)
