"""PSNR and SSIM against scikit-image."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from r2f_ext.audit.metrics import psnr_db, score, ssim


@pytest.fixture
def images():
    originals = torch.rand(5, 3, 16, 20)
    return (originals + 0.1 * torch.randn_like(originals)).clamp(0, 1), originals


def test_psnr_is_scikit_images(images):
    guess, true = images
    expected = [peak_signal_noise_ratio(t.numpy(), g.numpy(), data_range=1) for g, t in zip(guess, true, strict=True)]
    np.testing.assert_allclose(psnr_db(guess, true).numpy(), expected, rtol=1e-5)
    assert psnr_db(true, true).tolist() == [200.0] * 5
    assert psnr_db(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).item() == 0


def test_nothing_is_rescaled(images):
    _, true = images
    assert (psnr_db(0.5 * true, true) < 20).all()


def test_ssim_is_scikit_images(images):
    guess, true = images
    expected = [
        structural_similarity(
            g.permute(1, 2, 0).double().numpy(), t.permute(1, 2, 0).double().numpy(), channel_axis=2, data_range=1.0
        )
        for g, t in zip(guess, true, strict=True)
    ]
    np.testing.assert_allclose(ssim(guess, true).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(ssim(true, true).numpy(), 1)
    assert ssim(guess[:, :1], true[:, :1]).shape == (5,)


@pytest.mark.parametrize("count", [5, 4])
def test_score_is_over_images(images, count):
    guess, true = (part[:count] for part in images)
    psnr, similarity = psnr_db(guess, true), ssim(guess, true)
    expected = [function(psnr.numpy()) for function in (np.mean, np.std, np.median)] + [similarity.numpy().mean()]
    found = score(psnr, similarity)
    assert list(found) == ["psnr_db_mean", "psnr_db_std", "psnr_db_median", "ssim_mean"]
    assert list(found.values()) == pytest.approx(expected)
