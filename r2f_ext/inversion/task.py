"""The target of a Gauss-Newton search, the map that it inverts, and its settings (docs/methods.md, 3f)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot
from typing import TypeVar

from torch import Tensor

from r2f_ext.inversion.newton import ARRIVED
from r2f_ext.inversion.positions import FreePositions
from r2f_ext.inversion.update_map import Subspace

NEAR = 0.007  # relative residual below which the derivative at the point is a good enough model
HANDED_OVER = 0.1  # share of NEAR at which a descent ends and Newton steps take over

Residual = TypeVar("Residual", float, Tensor)


@dataclass(frozen=True)
class GaussNewtonConfig:
    """Stopping criteria and step control.

    Attributes:
        passes: maximum per victim, of all its searches; a cloud of images and a Jacobian cost about the
            same, a pass of descent about three times that, and one with free positions about four times that again.
        patience: passes without a reduction of the residual by a fifth after which the search begins again near its
            start.
        minutes: time after which no further pass of a victim begins (`Search.seconds`), but for passes of Newton's
            steps as long as each reduces the residual by a fifth; None: no limit. The result of a search that this
            limit ends depends on the machine's speed; other results do not.
        samples: images per direction in the clouds of the first search, of the second, ...; then from the first again.
        spread: how far a repeated search begins from the start, in standard deviations of the start's expected error.
        steps: maximum number of steps with one Jacobian.
        contraction: largest accepted ratio of the norm of the next correction to that of the present one.
        directions: batch size of tangents, or of images, in one pass of the model on a CPU.
        seed: seed of the clouds.
    """

    passes: int = 40
    patience: int = 6
    minutes: float | None = None
    samples: tuple[float, ...] = (1.5, 3.0)
    spread: float = 0.5
    steps: int = 8
    contraction: float = 0.75
    directions: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """The targets of V searches, and the map that they invert.

    Attributes:
        observed: [V, R]; layers: number of layers, whose updates of norm 1 are concatenated in it.
        update_of: images [n, p] and the victim of each int64 [n] -> updates [n, R].
        jacobian_of: a victim and its point [p] -> dz along the subspace's basis [q, R].
        slopes_of: points [n, p] and the victim of each -> misfits [n] and slopes [n, p].
        freed: the same for freed images, if the model is a ViT; None: patches keep their places.
        noise: residual that errors of `observed` leave at the victims' own images.
    """

    observed: Tensor
    layers: int
    subspace: Subspace
    update_of: Callable[[Tensor, Tensor], Tensor]
    jacobian_of: Callable[[int, Tensor], Tensor]
    slopes_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    freed: Freed | None = None
    noise: float = 0.0

    @property
    def handed_over(self) -> float:
        """The misfit at which a descent ends and Newton steps take over."""
        return self.misfit(HANDED_OVER * NEAR)

    def misfit(self, residual: Residual) -> Residual:
        """The misfit, layers * (residual^2 + noise^2) / 2, of relative residuals: a float or a tensor [n], as given."""
        return self.layers * (residual**2 + self.noise**2) / 2

    @property
    def near(self) -> float:
        """The residual below which the derivative at the point is a good enough model."""
        return hypot(NEAR, ARRIVED * self.noise)

    def residuals(self, values: Tensor, rows: Tensor) -> list[float]:
        """|z - z*| over the square root of the number of layers, of the victims `rows`, whose values are [n, R]."""
        lengths: list[float] = ((values - self.observed[rows]).norm(dim=1) / self.layers**0.5).tolist()
        return lengths


@dataclass(frozen=True)
class Freed:
    """A task for images whose patches may change places (see `FreePositions`), of the same victims."""

    positions: FreePositions
    task: Task
