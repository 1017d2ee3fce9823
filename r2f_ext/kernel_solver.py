"""Kernel ridge regression: solve (K + lambda I) w = y, leave-one-out errors, and the choice of lambda.

Used by decoders (`decoders/ridge.py`, `kernel_ridge.py`, `row_lmmse.py`) and by the regressions from updates to images
(`inversion/amortised.py`, `inversion/linearisation.py`). The kernels themselves belong to those modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.errors import R2FError

SKETCH = 64  # random combinations of the columns, whose leave-one-out errors choose lambda


@dataclass(frozen=True)
class RidgeSystem:
    """K + lambda I, represented by its lower triangular Cholesky factor L [n, n]."""

    factor: Tensor

    @classmethod
    def of(cls, matrix: Tensor, ridge: float) -> RidgeSystem:
        """Factorise K + lambda I.

        Args:
            matrix: K [n, n], symmetric and positive semidefinite; lambda is added to it in place.
            ridge: lambda.

        Raises:
            R2FError: K + lambda I is not positive definite to working precision.
        """
        matrix.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise R2FError(f"a system of {len(matrix)} unknowns is not positive definite: choose a larger lambda.")
        return cls(factor)

    def solve(self, right: Tensor) -> Tensor:
        """w [n, k] of right-hand sides y [n, k]."""
        return torch.cholesky_solve(right, self.factor)

    def predictions(self, features: Tensor, right: Tensor) -> Tensor:
        """features @ w [m, k] of features [m, n] for right-hand sides [n, k], in the dtype of the features.

        The system is solved for the columns of `right` or for the rows of `features`, whichever are fewer.
        """
        if right.shape[1] <= len(features):
            return features @ self.solve(right).to(features.dtype)
        return (self.solve(features.mT.to(right.dtype)).mT @ right).to(features.dtype)

    def leave_one_out_errors(self, dual: Tensor) -> Tensor:
        """y_i minus its prediction by a fit to all rows but i, [n, k], computed from the solution w [n, k] for y.

        w_i / ((K + lambda I)^-1)_ii (Rasmussen and Williams 2006, section 5.4.2).
        """
        return dual / torch.cholesky_inverse(self.factor).diagonal()[:, None]


def best_ridge(
    matrix: Tensor,
    right: Tensor,
    held_out: tuple[Tensor, Tensor],
    ridges: Sequence[float],
    score: Callable[[Tensor, Tensor], float],
) -> tuple[float, float]:
    """The lambda whose solution w of (matrix + lambda I) w = right predicts held-out rows best, and its score.

    Args:
        matrix: [n, n]; right: [n, k].
        held_out: features [m, n], predicted as features @ w, and their true values [m, k].
        ridges: the candidates for lambda; of those with equal scores the first is taken.
        score: of predictions and true values; the higher the better. NaN is never the best.

    Returns:
        (lambda, score); the last of `ridges` with -infinity where every score is NaN.
    """
    features, true = held_out
    best = ridges[-1], float("-inf")
    for ridge in ridges:
        predicted = RidgeSystem.of(matrix.clone(), ridge).predictions(features, right)
        if (found := score(predicted, true)) > best[1]:
            best = ridge, found
    return best


def fit_by_leave_one_out(kernel: Tensor, wanted: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Kernel ridge with a constant term, and with the lambda of the least mean squared leave-one-out error.

    One eigendecomposition serves all lambdas. If there are more than SKETCH columns, the lambdas are compared by the
    errors of SKETCH random combinations of the columns, the same ones for every lambda. The mean square of these errors
    estimates that of all columns, with a fraction of the matrix products.

    Args:
        kernel: [n, n], centred (rows and columns add up to 0), so that the least eigenvalue belongs to the constant
            term, which is fitted without damping.
        wanted: [n, k], centred (columns add up to 0).
        shares: the candidates for lambda, each as a share of the kernel's largest eigenvalue.

    Returns:
        (dual coefficients [n, k], leave-one-out errors [n, k]).

    Raises:
        R2FError: the errors of every candidate are NaN or infinite.
    """
    values, vectors = torch.linalg.eigh(kernel)
    turned = vectors.T @ wanted
    squares = vectors.square()

    def fit(share: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        inverse = 1 / (values.clamp_min(0) + share * values[-1])
        inverse[:1].zero_()
        dual = vectors @ (inverse[:, None] * columns)
        return dual, dual / (squares @ inverse)[:, None]

    sketch = turned if turned.shape[1] <= SKETCH else turned @ _combinations(turned)
    candidates = torch.tensor(shares, dtype=values.dtype, device=values.device)
    # Compared on the device: the host waits for it once, not once for every lambda.
    sizes = torch.stack([fit(share, sketch)[1].square().mean() for share in candidates])
    least, best = torch.where(sizes.isnan(), torch.inf, sizes).min(0)
    if not bool(least.isfinite()):
        raise R2FError("a kernel regression has no finite leave-one-out error: its updates hold NaN or do not vary.")
    return fit(candidates.take(best), turned)


def _combinations(columns: Tensor) -> Tensor:
    """[k, SKETCH] Gaussian weights for columns [n, k]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(columns.shape[1], SKETCH, generator=generator, dtype=columns.dtype).to(columns.device)
