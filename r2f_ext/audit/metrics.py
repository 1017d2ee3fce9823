"""PSNR and SSIM of raw images in [0, 1]; no rescaling per image (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import bootstrap
from skimage.metrics import structural_similarity
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 2000


def mean_interval(sample: Sequence[float] | np.ndarray, seed: int) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean of a sample [n] at CONFIDENCE; None for n = 1."""
    if len(sample) < 2:
        return None
    found = bootstrap(
        (np.asarray(sample, dtype=np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def psnr_db(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image, dB, [n]; images and originals [n, c, h, w] in [0, 1].

    Equal images give 200 dB, the ceiling.
    """
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-20))


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Windowed SSIM per image, [n] (Wang et al. 2004; 7x7 uniform window); images and originals [n, c, h, w]."""
    pairs = zip(images.cpu().double().numpy(), originals.cpu().double().numpy(), strict=True)
    scores = [structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs]
    return torch.from_numpy(np.asarray(scores))


def score(psnr: Tensor, similarity: Tensor) -> dict[str, float]:
    """A route's figures over n images, from each image's PSNR in dB and SSIM, [n] each: psnr_db_mean, and so on.

    The median of an even number of images is the mean of the middle two.
    """
    return {
        "psnr_db_mean": float(psnr.mean()),
        "psnr_db_std": float(psnr.std(correction=0)),
        "psnr_db_median": float(psnr.quantile(0.5)),
        "ssim_mean": float(similarity.mean()),
    }
