import math

import pytest
import torch
from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.inversion.patches import (
    Prior,
    expected_psnr_db,
    fold_patches,
    patch_prior,
    posterior_mean,
    prior_from_images,
    unfold_patches,
)
from r2f_ext.models.embedded import build_embedded_vit
from r2f_ext.types import BaseModel


def test_unfold_reads_patches_as_the_patch_embedding_does() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 7, kernel_size=(2, 4), stride=(2, 4), bias=False).double()
    images = torch.rand(2, 3, 6, 8, dtype=torch.float64)
    tokens = conv(images).flatten(2).mT
    by_hand = unfold_patches(images, (2, 4)) @ conv.weight.flatten(1).T
    torch.testing.assert_close(by_hand, tokens)


def test_fold_is_the_inverse_of_unfold() -> None:
    images = torch.rand(2, 3, 6, 8)
    assert torch.equal(fold_patches(unfold_patches(images, (2, 4)), (2, 4), (3, 2)), images)


def test_posterior_mean_is_least_squares_where_data_are_exact_and_the_prior_where_they_are_noise() -> None:
    torch.manual_seed(0)
    system = torch.randn(30, 5, dtype=torch.float64)
    truth = torch.randn(5, 4, dtype=torch.float64)
    prior = Prior(torch.full((5, 1), 0.5, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    exact = posterior_mean(system, system @ truth, prior)
    torch.testing.assert_close(exact.solution, truth)
    assert exact.noise < 1e-12 and exact.uncertainty < 1e-12
    drowned = posterior_mean(system, system @ truth + 1e4 * torch.randn(30, 4, dtype=torch.float64), prior)
    torch.testing.assert_close(drowned.solution, torch.full_like(truth, 0.5), atol=1e-2, rtol=0)
    assert 0.9 < drowned.uncertainty <= 1.0


def test_posterior_mean_measures_the_noise() -> None:
    torch.manual_seed(0)
    system, truth = torch.randn(60, 5, dtype=torch.float64), torch.randn(5, 40, dtype=torch.float64)
    prior = Prior(torch.zeros(5, 1, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    found = posterior_mean(system, system @ truth + 0.01 * torch.randn(60, 40, dtype=torch.float64), prior)
    assert abs(found.noise / 0.01 - 1) < 0.1
    error = (found.solution - truth).square().mean().sqrt().item()
    assert abs(found.uncertainty / error - 1) < 0.2


def test_posterior_mean_accepts_more_unknowns_than_equations() -> None:
    prior = Prior(torch.zeros(5, 1, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    found = posterior_mean(torch.eye(3, 5, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64), prior)
    torch.testing.assert_close(found.solution[:, 0], torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]).double())


def test_patch_prior_is_gray_and_covers_the_pixel_range() -> None:
    base = BaseModel(build_embedded_vit(), "embedded", (3, 32, 32), (0.2, 0.3, 0.4), (0.5, 0.25, 0.2), 10)
    prior = patch_prior(base, (4, 4))
    std = torch.tensor(base.std).double().repeat_interleave(16)
    torch.testing.assert_close(
        prior.mean[:, 0] * std + torch.tensor(base.mean).double().repeat_interleave(16), 0.5 + 0 * std
    )
    torch.testing.assert_close(prior.root.square().sum(1).sqrt() * std, torch.full_like(std, 0.4))


def _base() -> BaseModel:
    return BaseModel(build_embedded_vit(), "embedded", (3, 32, 32), (0.2, 0.3, 0.4), (0.5, 0.25, 0.2), 10)


def test_prior_from_images_has_their_mean_and_covariance() -> None:
    base, images = _base(), torch.rand(300, 3, 32, 32, dtype=torch.float64) * torch.linspace(0, 1, 32).double()
    prior = prior_from_images(base, images, (4, 4))
    mean = fold_patches(prior.mean.mT[None], (4, 4), (8, 8))
    torch.testing.assert_close(base.denormalize(mean)[0], images.mean(0))
    by_hand = torch.cov((unfold_patches(base.normalize(images), (4, 4)) - prior.mean.mT).flatten(0, 1).mT, correction=0)
    torch.testing.assert_close(prior.root @ prior.root.mT, by_hand, atol=2e-3 * by_hand.diagonal().mean(), rtol=0)


def test_prior_from_images_survives_constant_pixels_and_refuses_other_sizes() -> None:
    images = torch.zeros(5, 3, 32, 32)
    assert prior_from_images(_base(), images, (4, 4)).root.isfinite().all()
    for wrong in (images[:, :, :16], images[:1]):
        with pytest.raises(R2FError, match="do not fit"):
            prior_from_images(_base(), wrong, (4, 4))


def test_expected_psnr_is_that_of_the_error_in_pixels() -> None:
    rms = math.sqrt((0.5**2 + 0.25**2 + 0.2**2) / 3)
    assert abs(expected_psnr_db(_base(), 0.1) + 20 * math.log10(0.1 * rms)) < 1e-9
