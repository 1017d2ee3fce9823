"""Searches in which a ViT's patches are free to change places (docs/methods.md, 3f).

A ViT distinguishes its patches only by their position embeddings. From a poor start, a search often ends at an image in
which patches have changed places: every token is nearly right, but some stand at each other's positions, and between
two such orders the misfit is larger. The update is a function of the set of tokens alone, so the barrier disappears
once tokens need not keep the position embedding of their place. A *freed* image has extra channels, through which each
patch may add a part of a position embedding to its token; the tokens then move to those of the solution in any order.
Each token of the result is put where its position embedding fits it best.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import PATCH_EMBED, PATCH_WEIGHT, POSITIONS, base_geometry
from r2f_ext.inversion.patches import fold_patches, unfold_patches
from r2f_ext.types import BaseModel

MOST, MOST_OF_ALL = 32, 4096  # extra numbers of a patch, and of all patches of an image
# Lengths along an axis, in units of the root mean square difference of two position embeddings along it. STEP: how far
# one unit of a search coordinate moves a token. REACH: how far an extra channel moves it at the values 0 and 1, outside
# of which the penalty on values outside [0, 1] holds the search back.
STEP, REACH = 0.3, 4.0
VARIED = 1e-6  # singular values up to this share of the largest one count as 0


@dataclass(frozen=True)
class FreePositions:
    """A base model whose patches may add parts of position embeddings to their tokens, and the places that fit tokens.

    Images [n, p], p = c * h * w, of N patches; freed images [n, p'], p' = (c + e) * h * w; tokens of width d.

    Attributes:
        base: the base model for freed images.
        shape: (c, h, w) of an image; size: (height, width) of a patch; grid: (rows, columns) of patches.
        basis: [p', q + N K], the search space of freed images: that of images, and K extra numbers for each patch.
        weight: [d, c * height * width], what pixels in [0, 1] add to their token; contents: [c * height * width, b],
            the orthonormal directions along which patches vary.
        positions: [N, d], the position embeddings; extra: [d, e * height * width], what extra channels add to a token.
    """

    base: BaseModel
    shape: torch.Size
    size: tuple[int, int]
    grid: tuple[int, int]
    basis: Tensor
    weight: Tensor
    contents: Tensor
    positions: Tensor
    extra: Tensor

    @staticmethod
    def of(base: BaseModel, shape: torch.Size, basis: Tensor) -> FreePositions | None:
        """The freed images of a base whose images (c, h, w) vary along the orthogonal columns of basis [p, q].

        None: not a timm ViT whose patches tile the image, or its tokens are not pixels times a weight plus a position
        embedding.
        """
        try:
            geometry = base_geometry(base)
        except R2FError:
            return None
        if not geometry.has_pos_embed or geometry.has_embed_norm or geometry.position_grid != geometry.grid:
            return None
        count, size = geometry.patch_tokens, geometry.patch
        parameters = dict(base.model.named_parameters())
        projection, positions = parameters[PATCH_WEIGHT].detach(), parameters[POSITIONS].detach()[0, -count:]
        deviation = projection.new_tensor(base.std).repeat_interleave(size[0] * size[1])
        weight = projection.flatten(1) / deviation
        contents = _span(unfold_patches(basis.T.unflatten(1, shape), size).flatten(0, 1)).to(weight)
        # What distinguishes positions, and no content of a patch can make up for.
        rest = (positions - _onto(weight @ contents, positions)).double()
        _, lengths, axes = torch.linalg.svd(rest - rest.mean(0), full_matrices=False)
        kept = min(MOST, MOST_OF_ALL // count, int((lengths > VARIED * positions.norm()).sum()))
        if kept == 0:
            return None
        channels = -(-kept // (size[0] * size[1]))
        extra = weight.new_zeros(len(weight), channels * size[0] * size[1])
        differences = lengths[:kept, None] * (2 / count) ** 0.5  # root mean squares over pairs
        extra[:, :kept] = (2 * REACH * differences * axes[:kept]).T.to(extra)
        return FreePositions(
            _with_channels(base, extra, channels),
            shape,
            size,
            geometry.grid,
            _freed_basis(basis, count, kept, channels, size, geometry.grid),
            weight,
            contents,
            positions,
            extra,
        )

    def freed(self, images: Tensor) -> Tensor:
        """Images [n, p] whose tokens keep their position embeddings: [n, p']."""
        return torch.cat([images, images.new_full((len(images), len(self.basis) - images.shape[1]), 0.5)], dim=1)

    def placed(self, freed: Tensor) -> Tensor:
        """The images [n, p] whose tokens are those of freed images [n, p'], each put where it fits best.

        The cost of token i at place j is the squared norm of the part of the token outside position embedding j plus
        the span of patches, plus the squared distance of the resulting pixels from [0, 1]. The order of least total
        cost is found by `scipy.optimize.linear_sum_assignment`. What no content of a patch gives, such as a channel
        that never varies, stays in its place.
        """
        pixels = self.shape.numel()
        images, extras = freed[:, :pixels].unflatten(1, self.shape), freed[:, pixels:] - 0.5
        extras = extras.unflatten(1, (-1, *self.shape[1:]))
        patches = unfold_patches(images, self.size)
        tokens = patches @ self.weight.T + self.positions + unfold_patches(extras, self.size) @ self.extra.T
        fixed = patches - patches @ self.contents @ self.contents.T
        shown = self.positions + fixed @ self.weight.T  # what each place adds to the contents of its patch
        directions = self.weight @ self.contents
        to_contents = (self.contents.double() @ torch.linalg.pinv(directions.double())).to(tokens)
        own, shifts = tokens @ to_contents.T, shown @ to_contents.T
        left, places = tokens - _onto(directions, tokens), shown - _onto(directions, shown)
        found = [
            _assigned(one[:, None] - shift, *rest)
            for one, shift, *rest in zip(own, shifts, left, places, fixed, strict=True)
        ]
        return fold_patches(torch.stack(found), self.size, self.grid).flatten(1)


def _assigned(contents: Tensor, left: Tensor, places: Tensor, fixed: Tensor) -> Tensor:
    """The patches [N, m] of an image in the order of least cost.

    Args:
        contents: [N, N, m], of token i at place j; left, places: [N, d], the parts of tokens and of position embeddings
            that no content gives; fixed: [N, m], the part of the pixels of place j that no content gives.
    """
    contents = contents + fixed
    outside = (contents - contents.clamp(0, 1)).square().sum(2)
    cost = torch.cdist(left, places).square() + outside
    # Points that are not finite end a search elsewhere; scipy refuses them.
    one, other = linear_sum_assignment(cost.double().nan_to_num(nan=0, posinf=1e30).cpu().numpy())
    patches = torch.empty_like(contents[0])
    patches[torch.as_tensor(other)] = contents[torch.as_tensor(one), torch.as_tensor(other)]
    return patches


def _span(rows: Tensor) -> Tensor:
    """Orthonormal columns [m, b] that span the rows [n, m]."""
    _, lengths, axes = torch.linalg.svd(rows.double(), full_matrices=False)
    return axes[lengths > VARIED * lengths[0]].T


def _onto(directions: Tensor, vectors: Tensor) -> Tensor:
    """The parts of vectors [..., d] in the span of directions [d, b]."""
    frame = torch.linalg.qr(directions.double())[0].to(vectors)
    return vectors @ frame @ frame.T


def _with_channels(base: BaseModel, extra: Tensor, channels: int) -> BaseModel:
    """A copy of the base that reads further channels, of mean 0.5, through the weight extra [d, channels * h * w]."""
    model = deepcopy(base.model)
    old = model.get_submodule(PATCH_EMBED)
    assert isinstance(old, nn.Conv2d)
    size = (old.kernel_size[0], old.kernel_size[1])
    weight = torch.cat([old.weight, extra.unflatten(1, (channels, *size))], dim=1)
    old.weight, old.in_channels = nn.Parameter(weight, requires_grad=False), weight.shape[1]
    count, height, width = base.input_shape
    mean, std = (*base.mean, *[0.5] * channels), (*base.std, *[1.0] * channels)
    return replace(base, model=model, input_shape=(count + channels, height, width), mean=mean, std=std)


def _freed_basis(
    basis: Tensor, count: int, kept: int, channels: int, size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """[p', q + count * kept]: the columns of basis [p, q], and one for each of `kept` extra numbers of each patch."""
    pixels, directions = basis.shape
    numbers = channels * size[0] * size[1]
    each = torch.eye(count * numbers, dtype=basis.dtype, device=basis.device).view(count, numbers, count, numbers)
    images = fold_patches(each[:, :kept].flatten(0, 1), size, grid).flatten(1)
    freed = basis.new_zeros(pixels + images.shape[1], directions + len(images))
    freed[:pixels, :directions], freed[pixels:, directions:] = basis, STEP / (2 * REACH) * images.T
    return freed
