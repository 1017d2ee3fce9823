"""Axes of pixel space along which errors of an update move the image that was found for it (see `exactness`).

The update map z is linearised at the image in *all* pixels: J = dz / dpixels. An error n of z moves the image by J^+ n.
The axes are the eigenvectors of J^T J or, where no direction can be free, the pixels themselves, which takes no
eigendecomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.linalg import precise_gram, smallest_eigenvalue
from r2f_ext.types import Target

FREE = 0.1  # length of a move, in units of the pixel range, from which on an axis counts as free
SAFETY = 3.0  # multiple of the root mean square move by rounding that the bound allows for: 9.5 dB
EXPLAINED = 3.0  # largest ratio of the residual that is left to the one expected of rounding
RELIABLE = 1e-13  # share of the trace of J^T J below which an eigenvalue is rounding; J: float64 rounded to float32
# Ratio of the smallest singular value of a Jacobian in the model's own arithmetic to the error of that arithmetic, both
# relative, from which on that Jacobian serves.
MARGIN = 5.0
SKETCH = 4  # numbers kept of z per pixel; a random sketch of more is as good and bounds memory


class DenseMap(Protocol):
    """A map z from images to updates with a dense Jacobian: `update_map.UpdateMap` or `unrolled.UnrolledMap`.

    Attributes:
        directions: batch size of images, or of tangents.
    """

    target: Target
    directions: int

    def __call__(self, points: Tensor, label: Tensor, /) -> Tensor:
        """Points [n, p] in [0, 1], all of one label [1] -> [n, R]."""
        ...

    def together(self, batches: Tensor, label: Tensor, /) -> Tensor:
        """Updates of n victims that trained on batches [n, b, p] of one label [1] -> [n, R]."""
        ...

    def jacobian(self, point: Tensor, label: Tensor, basis: Tensor, /) -> Tensor:
        """dz along the columns of basis [p, q] at point [p]: [q, R]."""
        ...


@dataclass(frozen=True)
class Jacobian:
    """J at one image, sketched: rows [p, m] float32, one per pixel.

    Attributes:
        bucket, sign: the sketch, of z's R numbers.
    """

    rows: Tensor
    bucket: Tensor
    sign: Tensor

    @staticmethod
    def of(updates: DenseMap, point: Tensor, label: Tensor) -> Jacobian:
        identity = torch.eye(len(point), dtype=point.dtype, device=point.device)
        size = updates(point[None], label).shape[1]
        bucket, sign = _sketch(size, SKETCH * len(point), point.device)
        sign = sign.to(point.dtype)
        parts = [
            _sketched(updates.jacobian(point, label, columns), bucket, sign).float()
            for columns in identity.split(updates.directions, dim=1)
        ]
        return Jacobian(torch.cat(parts), bucket, sign.double())

    def sketched(self, rows: Tensor) -> Tensor:
        """Rows [n, R] float64 -> [n, m]."""
        return _sketched(rows, self.bucket, self.sign)

    def pulls(self, errors: Tensor) -> Tensor:
        """J^T r of errors of z [n, R]: [n, p] float64."""
        return (self.sketched(errors).float() @ self.rows.T).double()


class ErrorAxes(Protocol):
    """Orthonormal axes of pixel space, and how far errors of z move the image along them."""

    @property
    def jacobian(self) -> Jacobian: ...

    @property
    def reliable(self) -> Tensor:
        """bool [p]: axes along which the curvature of |z|^2 is more than rounding."""
        ...

    def moves(self, errors: Tensor) -> Tensor:
        """Moves of the image along the axes by errors of z [n, R]: [n, p] float64, infinite along unreliable axes."""
        ...

    def eigenvectors(self) -> EigenvectorAxes:
        """The eigenvectors of the same J^T J. All are determined if all of these axes are."""
        ...

    def in_pixels(self, moves: Tensor) -> Tensor:
        """Moves along the axes [..., p] as changes of the pixels [..., p]."""
        ...


@dataclass(frozen=True)
class PixelAxes:
    """The pixels as axes, for images that z determines in all directions: `factor` is the Cholesky factor of J^T J."""

    jacobian: Jacobian
    factor: Tensor

    @staticmethod
    def of(rough: DenseMap, precise: DenseMap, image: Tensor, label: Tensor, errors: Tensor) -> PixelAxes | None:
        """From the Jacobian in the model's own arithmetic, without an eigendecomposition; None if it is not precise
        enough, or if a direction could be free."""
        exact = precise(image.double()[None], label)
        noise = float((rough(image[None], label).double() - exact).norm() / exact.norm())
        jacobian = Jacobian.of(rough, image, label)
        gram = precise_gram(jacobian.rows)
        factor, failed = torch.linalg.cholesky_ex(gram)
        least = 0.0 if bool(failed > 0) else smallest_eigenvalue(factor)
        if not least > max(RELIABLE, (MARGIN * noise) ** 2) * float(gram.trace()):
            return None
        axes = PixelAxes(jacobian, factor)
        longest = float(torch.linalg.matrix_norm(axes.moves(errors), 2)) / len(errors) ** 0.5
        return axes if SAFETY * EXPLAINED * longest < FREE else None

    @property
    def reliable(self) -> Tensor:
        return torch.ones(len(self.factor), dtype=torch.bool, device=self.factor.device)

    def moves(self, errors: Tensor) -> Tensor:
        return torch.cholesky_solve(self.jacobian.pulls(errors).T, self.factor).T

    def eigenvectors(self) -> EigenvectorAxes:
        return EigenvectorAxes.of_gram(self.jacobian, self.factor @ self.factor.T)

    def in_pixels(self, moves: Tensor) -> Tensor:
        return moves


@dataclass(frozen=True)
class EigenvectorAxes:
    """The eigenvectors of J^T J as axes.

    Attributes:
        curvature: [p] float64, ascending; directions: [p, p] float64, one axis a column.
    """

    jacobian: Jacobian
    curvature: Tensor
    directions: Tensor

    @staticmethod
    def of(precise: DenseMap, point: Tensor, label: Tensor) -> EigenvectorAxes:
        jacobian = Jacobian.of(precise, point, label)
        return EigenvectorAxes.of_gram(jacobian, precise_gram(jacobian.rows))

    @staticmethod
    def of_gram(jacobian: Jacobian, gram: Tensor) -> EigenvectorAxes:
        return EigenvectorAxes(jacobian, *torch.linalg.eigh(gram))

    def eigenvectors(self) -> EigenvectorAxes:
        return self

    @property
    def reliable(self) -> Tensor:
        return self.curvature > RELIABLE * self.curvature.sum()

    def moves(self, errors: Tensor, dampings: tuple[float, ...] = (0.0,)) -> Tensor:
        """See `ErrorAxes`; with k dampings of J^T J, in shares of its trace: [k, p] for errors [1, R]."""
        damped = self.curvature + self.curvature.new_tensor(dampings)[:, None] * self.curvature.sum()
        return torch.where(self.reliable, self.jacobian.pulls(errors) @ self.directions / damped, torch.inf)

    def in_pixels(self, moves: Tensor) -> Tensor:
        return moves @ self.directions.T


def _sketch(size: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where and with which sign each of `size` numbers is added (the count sketch: Clarkson and Woodruff, 2013)."""
    generator = torch.Generator().manual_seed(1)
    if size <= kept:
        return torch.arange(size, device=device), torch.ones(size, dtype=torch.float64, device=device)
    bucket = torch.randint(kept, (size,), generator=generator)
    sign = 2.0 * torch.randint(2, (size,), generator=generator).double() - 1
    return bucket.to(device), sign.to(device)


def _sketched(rows: Tensor, bucket: Tensor, sign: Tensor) -> Tensor:
    """Rows [n, R] float64 -> [n, m]."""
    return rows.new_zeros(len(rows), int(bucket.max()) + 1).index_add_(1, bucket, rows * sign)
