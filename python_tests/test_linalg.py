"""Blocked products against the plain ones."""

import pytest
import torch

from r2f_ext import linalg
from r2f_ext.errors import R2FError
from r2f_ext.linalg import (
    first_not_finite,
    gram,
    largest_eigenvalues,
    precise_gram,
    smallest_eigenvalue,
    solve_in_place,
    sum_in_place,
)


@pytest.mark.parametrize("count", [1, 6, 7, 8, 20])
def test_gram(count, monkeypatch):
    monkeypatch.setattr(linalg, "BLOCK", 7)
    rows = torch.randn(count, 5, dtype=torch.float64)
    torch.testing.assert_close(gram(rows), rows @ rows.T)
    assert torch.equal(gram(rows)[7:, :7], gram(rows)[:7, 7:].T)  # mirrored, not computed twice


def test_sum_in_place():
    terms = torch.randn(4, 3)
    torch.testing.assert_close(sum_in_place(term.clone() for term in terms), terms.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_in_place(dtype, device):
    rows = torch.randn(30, 40, dtype=torch.float64)
    matrix, right = rows @ rows.mT + torch.eye(30).double(), torch.randn(30, 4).double()
    expected = torch.linalg.solve(matrix, right)
    for given in (right, right.mT.contiguous().mT):
        found = solve_in_place(matrix.to(device, dtype).clone(), given.to(device, dtype))
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-3, atol=1e-4)


def test_the_factor_takes_the_place_of_the_matrix():
    matrix = 4 * torch.eye(3) + 1
    solve_in_place(matrix, torch.ones(3, 1))
    assert abs(matrix[0, 0] - 5**0.5) < 1e-5  # Cholesky's first pivot, not 5: no copy was made


def test_a_matrix_that_is_not_positive_definite_is_refused(device):
    with pytest.raises(R2FError, match="not positive definite: choose a larger lambda"):
        solve_in_place(-torch.eye(3, device=device), torch.ones(3, 1, device=device))


def test_the_first_row_that_is_not_finite():
    rows = torch.zeros(4, 2, 3)
    assert first_not_finite(rows) is None and first_not_finite(rows[:0]) is None
    rows[3, 0, 0], rows[2, 1, 2] = torch.nan, -torch.inf
    assert first_not_finite(rows) == 2


def test_precise_gram_is_the_product_in_float64_of_more_columns_than_one_part_holds():
    torch.manual_seed(0)
    rows = torch.randn(3, 4096 + 5)
    found = precise_gram(rows)
    torch.testing.assert_close(found, rows.double() @ rows.double().T)
    assert found.dtype == torch.float64


def test_the_largest_eigenvalue_is_found_to_a_few_per_cent():
    torch.manual_seed(0)
    rows = torch.randn(3, 30, 40, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    matrices = rows @ rows.mT
    found, expected = largest_eigenvalues(matrices), torch.linalg.eigvalsh(matrices)[:, -1]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    assert torch.equal(largest_eigenvalues(torch.zeros(1, 4, 4)), torch.zeros(1))


@pytest.mark.parametrize("smallest", [1.0, 1e-6])
def test_the_smallest_eigenvalue(smallest):
    torch.manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    values = torch.cat([torch.tensor([smallest], dtype=torch.float64), 1.2 + torch.rand(39, dtype=torch.float64)])
    matrix = axes @ torch.diag(values) @ axes.T
    assert smallest_eigenvalue(torch.linalg.cholesky(matrix)) == pytest.approx(smallest, rel=0.01)


def test_the_smallest_of_many_eigenvalues_that_are_nearly_equal():
    """Twelve per cent below 599 others."""
    torch.manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(600, 600, dtype=torch.float64))
    values = torch.cat([torch.tensor([1.0], dtype=torch.float64), torch.linspace(1.12, 1.3, 599, dtype=torch.float64)])
    factor = torch.linalg.cholesky(axes @ torch.diag(values) @ axes.T)
    assert smallest_eigenvalue(factor) == pytest.approx(1.0, rel=0.01)
    assert smallest_eigenvalue(factor) == smallest_eigenvalue(factor)
