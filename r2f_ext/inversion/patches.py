"""Images as patches, Gaussian priors of patches, and the linear solve that uses them.

The order of a patch's pixels is that of a flattened Conv2d kernel: channel, row, column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.types import BaseModel

# A generic pixel in [0, 1]: mid gray on average, spread over the range, correlated between neighbours and channels.
PIXEL_PRIOR_MEAN = 0.5
PIXEL_PRIOR_STD = 0.4
NEIGHBOUR_LENGTH = 8.0
CHANNEL_CORRELATION = 0.95
# The condition number beyond which float64 itself, not the data, limits a solve.
FLOAT64_FLOOR = 1e-15
# Variance, relative to the mean over pixels, added in all directions to the covariance of public images.
PRIOR_FLOOR = 1e-3
# Lower bound on 1 - noise / natural variance; at the bound the equations have practically no weight.
NO_INFORMATION = 1e-12


def unfold_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images [n, c, h, w] -> patches [n, N, c * ph * pw], row by row, as a patchifying Conv2d reads them."""
    n, c, h, w = images.shape
    rows, cols = h // patch[0], w // patch[1]
    tiles = images.reshape(n, c, rows, patch[0], cols, patch[1])
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * cols, c * patch[0] * patch[1])


def fold_patches(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Patches [n, N, c * ph * pw] -> images [n, c, h, w]; the inverse of `unfold_patches`."""
    n = len(patches)
    tiles = patches.reshape(n, grid[0], grid[1], -1, patch[0], patch[1])
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, grid[0] * patch[0], grid[1] * patch[1])


def to_image(base: BaseModel, patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Model inputs as patches [N, c * ph * pw], any float dtype -> image [1, c, h, w] in [0, 1], float32."""
    image = base.denormalize(fold_patches(patches[None], patch, grid))
    return image.clamp(0, 1).float()


@dataclass(frozen=True)
class Prior:
    """A Gaussian prior of k unknowns for each of n columns.

    Attributes (float64):
        mean: [k, 1], or [k, n] where every column has its own.
        root: [k, k], a square root of the covariance, the same for all columns.
    """

    mean: Tensor
    root: Tensor


def prior_from_images(base: BaseModel, images: Tensor, patch: tuple[int, int]) -> Prior:
    """Prior of the patches of one image from similar public images: mean [k, N] by position, pooled covariance.

    Args:
        images: [n, c, h, w] in [0, 1], of the base's input size; hundreds.

    Raises:
        R2FError: the images do not fit the base.
    """
    if tuple(images.shape[1:]) != tuple(base.input_shape) or len(images) < 2:
        raise R2FError(f"prior images {tuple(images.shape)} do not fit the base's input {base.input_shape}.")
    patches = unfold_patches(base.normalize(images.to(base.device, torch.float64)), patch)
    mean = patches.mean(0)
    spread = (patches - mean).flatten(0, 1)
    covariance = spread.mT @ spread / len(spread)
    # Directions without variance in these images (border pixels that are always black) get a small one.
    width = PRIOR_FLOOR * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
    root = torch.linalg.cholesky(covariance + width * torch.eye(len(covariance), dtype=torch.float64).to(covariance))
    return Prior(mean.mT, root)


def patch_prior(base: BaseModel, patch: tuple[int, int]) -> Prior:
    """Prior of one patch of model inputs without data: smooth, gray, within the pixel range.

    It has no effect where the gradient is precise; elsewhere it keeps the solve from amplifying noise.
    """
    std = torch.tensor(base.std, dtype=torch.float64)
    gray = (PIXEL_PRIOR_MEAN - torch.tensor(base.mean, dtype=torch.float64)) / std
    steps = torch.cartesian_prod(torch.arange(patch[0]), torch.arange(patch[1])).double()
    within = torch.exp(-torch.cdist(steps, steps) / NEIGHBOUR_LENGTH)
    channels = len(std)
    between = torch.full((channels, channels), CHANNEL_CORRELATION, dtype=torch.float64).fill_diagonal_(1.0)
    scale = (PIXEL_PRIOR_STD / std).repeat_interleave(len(steps))
    covariance = scale[:, None] * torch.kron(between, within) * scale
    root = torch.linalg.cholesky(covariance)
    return Prior(gray.repeat_interleave(len(steps))[:, None].to(base.device), root.to(base.device))


@dataclass(frozen=True)
class Estimate:
    """Solution of a linear system with an unknown, even noise level.

    Attributes:
        solution: [k, n].
        noise: standard deviation of one equation's error, from the residual.
        uncertainty: root-mean-square standard deviation of one unknown after the data.
    """

    solution: Tensor
    noise: float
    uncertainty: float

    def details(self, base: BaseModel) -> dict[str, float]:
        """For `Reconstruction.details`."""
        error = self.uncertainty
        return {"noise": self.noise, "expected_error": error, "expected_psnr_db": expected_psnr_db(base, error)}


def posterior_mean(system: Tensor, rhs: Tensor, prior: Prior, buried: float = 0.0) -> Estimate:
    """Solve system [m, k] @ solution [k, n] = rhs [m, n], float64, for n right-hand sides at once.

    The noise level comes from the part of `rhs` that no solution reaches, (m - k) n numbers; where m <= k it
    is set by float64's precision. The estimate is the mean of the Gaussian posterior: the least-squares
    solution where the data are precise, the prior mean in directions that are hidden by noise.

    Args:
        buried: share of the equations' natural variance (what the prior expects of their two sides' difference) that
            is known to be error, in [0, 1]. Equations v^T t = 0 hold up to their natural variance e0^2 for any
            direction v, so an error e^2 counts as 1 / (1 / e^2 - 1 / e0^2): at 1 they say nothing.
    """
    left, singular, right = torch.linalg.svd(system @ prior.root, full_matrices=False)
    surprise = rhs - system @ prior.mean
    seen = left.mT @ surprise
    spare = system.shape[0] - system.shape[1]
    floor = (FLOAT64_FLOOR * rhs.square().mean().sqrt()).square().clamp_min(torch.finfo(torch.float64).tiny)
    noise = floor
    if spare > 0:
        unreached = (surprise - left @ seen).square().sum() / (spare * rhs.shape[1])
        noise = torch.maximum(unreached, floor)
    measured = noise.sqrt().item()
    if buried > 0:
        natural = surprise.square().mean() + (system @ prior.root).square().sum() / len(system)
        noise = torch.maximum(noise, buried * natural)
        noise = noise / (1 - noise / natural).clamp_min(NO_INFORMATION)
    gain = singular / (singular.square() + noise)
    solution = prior.mean + prior.root @ (right.mT @ (gain[:, None] * seen))
    spread = prior.root @ right.mT
    hidden = (spread.square() * (noise / (singular.square() + noise))).sum()
    unseen = (prior.root.square().sum() - spread.square().sum()).clamp_min(0)
    return Estimate(solution, measured, ((hidden + unseen) / system.shape[1]).sqrt().item())


def expected_psnr_db(base: BaseModel, uncertainty: float) -> float:
    """PSNR in dB of an image whose model inputs err by `uncertainty` (root mean square), before clamping."""
    pixel = uncertainty * torch.tensor(base.std, dtype=torch.float64).square().mean().sqrt().item()
    return -20 * math.log10(max(pixel, 1e-10))
