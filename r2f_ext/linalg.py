"""Linear algebra shared by decoders and inversion."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.linalg import get_lapack_funcs
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.onednn import linear

BLOCK = 256  # rows of a block; smaller ones compute less of what is mirrored, but in slower products
GRAM_COLUMNS = 4096  # columns that are copied to float64 at a time
POWERS = 30  # steps of the power iteration


def gram(rows: Tensor) -> Tensor:
    """rows @ rows.T [n, n] for rows [n, k]. Blocks on and below the diagonal are computed, the others mirrored."""
    count = len(rows)
    result = rows.new_empty(count, count)
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        result[first:, first:last] = linear(rows[first:], rows[first:last])
        result[first:last, last:] = result[last:, first:last].mT
    return result


def precise_gram(rows: Tensor) -> Tensor:
    """rows @ rows.T [n, n] in float64 for rows [n, k] of any dtype; few columns at a time are copied to float64."""
    return sum_in_place(gram(part) for part in map(Tensor.double, rows.split(GRAM_COLUMNS, dim=1)))


def largest_eigenvalues(matrices: Tensor) -> Tensor:
    """The largest eigenvalue [V], to a few per cent, of positive semidefinite matrices [V, n, n]: power iteration."""
    vectors = matrices.sum(2, keepdim=True) + matrices.diagonal(dim1=1, dim2=2)[:, :, None]
    tiny = torch.finfo(matrices.dtype).tiny
    for _ in range(POWERS):
        vectors = matrices @ (vectors / vectors.norm(dim=1, keepdim=True).clamp_min(tiny))
    return vectors.norm(dim=1)[:, 0]


def smallest_eigenvalue(factor: Tensor) -> float:
    """The smallest eigenvalue, to one per cent, of the matrix with this Cholesky factor [n, n], n >= 2: Lanczos' method
    on the inverse (ARPACK), with about twenty solutions of one vector."""

    def solved(vector: np.ndarray) -> np.ndarray:
        right = torch.from_numpy(vector.astype(np.float64)).to(factor)
        return torch.cholesky_solve(right.view(-1, 1), factor).flatten().cpu().numpy()

    inverse = LinearOperator(tuple(factor.shape), matvec=solved, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(factor))
    (largest,) = eigsh(inverse, k=1, which="LM", tol=0.01, v0=start, return_eigenvectors=False)
    return 1 / float(largest)


def first_not_finite(rows: Tensor) -> int | None:
    """The index of the first row of [n, ...] that holds NaN or infinity; None where all are finite."""
    damaged = rows.flatten(1).isfinite().all(1).logical_not()
    return int(damaged.nonzero()[0]) if bool(damaged.any()) else None


def sum_in_place(terms: Iterable[Tensor]) -> Tensor:
    """Sum of temporary tensors of one shape; the first is overwritten with the result."""
    iterator = iter(terms)
    total = next(iterator)
    for term in iterator:
        total += term
    return total


def solve_in_place(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve matrix x = right by Cholesky: matrix [n, n] symmetric positive definite, right [n, k], x [n, k].

    On the CPU the factor overwrites the matrix. LAPACK's posv, called through scipy, needs no second matrix;
    torch.linalg.cholesky and cholesky_solve do (1.6 GB each for n = 20,000 in float32).

    Raises:
        R2FError: the matrix is not positive definite to working precision.
    """
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        failed, solution = int(info), torch.cholesky_solve(right, factor)
    else:
        rows, columns = (
            matrix.numpy(),
            right.T.contiguous().numpy().T,
        )  # LAPACK is column-major
        (posv,) = get_lapack_funcs(("posv",), (rows, columns))
        _, found, failed = posv(rows.T, columns, overwrite_a=True, overwrite_b=True)
        solution = torch.from_numpy(found.T).mT
    if failed:
        raise R2FError(f"a system of {len(matrix)} pairs is not positive definite: choose a larger lambda.")
    return solution
