"""Exchanges of two patches, from points where the search for a ViT's image stalls (docs/methods.md, 3f).

A ViT distinguishes its patches only by their position embeddings, so an image in which patches have changed places has
nearly the same update. Most points where a search stalls are such images: some patches hold each other's contents, each
shifted to compensate for the difference of the position embeddings, and everything else is right. Descent cannot leave
such a point, because the misfit is larger everywhere between it and the solution. This module tries the exchange of
every pair of patches, and descents from the best results decide which one is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import base_geometry
from r2f_ext.inversion.patches import fold_patches, unfold_patches
from r2f_ext.inversion.preconditioned import SlopesOf, preconditioned_descent
from r2f_ext.types import BaseModel

APART = 0.04  # root mean square difference of two patches below which their exchange changes nothing
MOST = 4096  # exchanges that are tried; of more, as many at equal distances in their list
CANDIDATES = 32  # images that descents begin from: the point itself, and the exchanges of least misfit
# Evaluations of the misfit, the damping relative to the largest eigenvalue of J^T J, and how many images go on.
ROUNDS = ((30, 1e-4, 8), (100, 1e-5, 2), (200, 1e-5, 1))

Misfits = Callable[[Tensor], Tensor]  # images [n, p] -> [n]


@dataclass(frozen=True)
class Patches:
    """The patches of a ViT's images.

    Attributes:
        shape: (c, h, w) of an image; size: (height, width) of a patch; grid: (rows, columns) of N patches.
        shifts: [N, N, c * height * width], what is added to the content of patch i when it moves to position j, so that
            the model's token for it changes as little as images allow.
    """

    shape: torch.Size
    size: tuple[int, int]
    grid: tuple[int, int]
    shifts: Tensor

    @staticmethod
    def of(base: BaseModel, shape: torch.Size, basis: Tensor) -> Patches | None:
        """The patches of images (c, h, w) that vary along the columns of basis [c * h * w, q]; None: not a timm ViT
        whose patches tile the image."""
        try:
            geometry = base_geometry(base)
        except R2FError:
            return None
        count = geometry.patch_tokens
        weight = base.model.patch_embed.proj.weight.flatten(1).to(basis)  # type: ignore[operator, union-attr]
        deviation = torch.as_tensor(base.std).to(basis).repeat_interleave(weight.shape[1] // len(base.std))
        shifts = basis.new_zeros(count, count, weight.shape[1])
        if geometry.has_pos_embed and geometry.position_grid == geometry.grid:
            # Directions along which any patch varies: of gray images the channels move together.
            varied = unfold_patches(basis.T.unflatten(1, shape), geometry.patch).flatten(0, 1)
            _, lengths, rows = torch.linalg.svd(varied, full_matrices=False)
            along = rows[lengths > 1e-6 * lengths[0]].T
            positions = base.model.pos_embed[0, -count:].to(basis)  # type: ignore[index]
            differences = positions[:, None] - positions
            shifts = differences @ torch.linalg.pinv((weight / deviation) @ along).T @ along.T
        return Patches(shape, geometry.patch, geometry.grid, shifts)

    def exchanged(self, image: Tensor) -> Tensor:
        """Image [p] with two different patches exchanged, for each pair: [n, p] with n <= min(N (N - 1) / 2, MOST)."""
        patches = unfold_patches(image.view(1, *self.shape), self.size)[0]
        one, other = torch.triu_indices(len(patches), len(patches), 1, device=image.device)
        differ = (patches[one] - patches[other]).square().mean(1).sqrt() > APART
        chosen = differ.nonzero()[:, 0]
        if len(chosen) == 0:
            return image.new_empty(0, len(image))
        if len(chosen) > MOST:
            chosen = chosen[torch.linspace(0, len(chosen) - 1, MOST, dtype=torch.float64).long()]
        one, other = one[chosen], other[chosen]
        moved, rows = patches.expand(len(one), *patches.shape).clone(), torch.arange(len(one), device=image.device)
        moved[rows, other] = patches[one] + self.shifts[one, other]
        moved[rows, one] = patches[other] + self.shifts[other, one]
        return fold_patches(moved, self.size, self.grid).flatten(1)


def exchanged_descent(
    patches: Patches,
    slopes_of: SlopesOf,
    misfits_of: Misfits,
    point: Tensor,
    gram: Tensor,
    basis: Tensor,
    enough: float,
) -> Tensor:
    """The best image [p] of descents from image [p] and from its exchanges, in the span of basis [p, q] round it.

    Args:
        slopes_of: as of `preconditioned_descent`, for images of this one victim.
        misfits_of: images [n, p] -> their misfits [n].
        gram: [q, q] float64, J^T J at the point, J = dz along the columns of `basis`.
        enough: misfit below which a descent ends.
    """
    directions = basis / basis.norm(dim=0)
    exchanges = patches.exchanged(point)
    images = point[None]
    if len(exchanges) > 0:
        exchanges = (point + (exchanges - point) @ directions @ directions.T).clamp(0, 1)
        images = torch.cat([images, exchanges[misfits_of(exchanges).argsort()[: CANDIDATES - 1]]])
    for evaluations, damping, left in ROUNDS:
        dampings = gram.new_tensor([damping])
        images = preconditioned_descent(slopes_of, images, gram[None], basis, dampings, enough, evaluations)
        images = images[misfits_of(images).nan_to_num(nan=torch.inf).argsort()[:left]]
    return images[0]
