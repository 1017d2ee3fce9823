"""The result of a Gauss-Newton search, and what its dense and its matrix-free form share (docs/methods.md, 3f).

The damping of every step is chosen by the *natural* monotonicity test (Deuflhard, Newton Methods for Nonlinear
Problems, 2004, section 4.3): a step is good if it shrinks the next correction (J^T J + m I)^-1 J^T r, not the residual.
The residual is dominated by a few steep directions, and a search that requires it to decrease stalls in their curved
valleys. Several steps use the same Jacobian while they contract (simplified Newton), because a Jacobian costs far more
than a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r2f_ext.inversion.exactness import REPRODUCED

DAMPINGS = tuple(10.0**-k for k in range(2, 14))  # relative to J^T J's largest eigenvalue
SOLVED = 1e-5  # relative residual below which float32 holds no more information
PRECISE = 1e-4  # relative residual below which a search that no longer improves has reached float32's precision
# Ratio to the start's residual below which an image that does not reproduce its update replaces the start.
IMPROVED = 0.03
# Where the update itself has errors: multiples of the residual that they leave, in place of SOLVED and PRECISE, and up
# to which an image replaces the start.
ARRIVED, NEARLY_ARRIVED, CREDIBLE = 1.05, 1.2, 2.0
STALLED = 0.8  # ratio to the lowest residual so far below which a pass counts as an improvement


@dataclass(frozen=True)
class Search:
    """The result of one victim's search.

    Attributes:
        image: [c * h * w] in [0, 1].
        residual: of the image, |z(x) - z*| over the square root of the number of layers: 0 where the image's update is
            the observed one, about 1 for an unrelated image. It does not say whether another image has the same update.
        start_residual: the same at the start.
        passes: number of passes taken.
        stopped: the time limit ended it.
        seconds: time of its passes; that of a pass that several victims take together is divided among them.
        noise: residual that errors of the update leave at the victim's own image.
    """

    image: Tensor
    residual: float
    start_residual: float
    passes: int
    stopped: bool = False
    seconds: float = 0.0
    noise: float = 0.0

    @property
    def improved(self) -> bool:
        """Whether the image should replace the start."""
        return self.residual < max(REPRODUCED, IMPROVED * self.start_residual, CREDIBLE * self.noise)


def dense_jacobian(
    tangents: Callable[[Tensor], Tensor], basis: Tensor, directions: int, shape: tuple[int, ...]
) -> Tensor:
    """dz along the columns of basis [p, q], in batches: [q, R].

    Args:
        tangents: directions [directions, *shape] -> [directions, R]; traced for one shape, so the last batch is padded.
    """
    columns = basis.shape[1]
    rows = F.pad(basis.T, (0, 0, 0, -columns % directions)).unflatten(1, shape)
    return torch.cat([tangents(part) for part in rows.split(directions)])[:columns]
