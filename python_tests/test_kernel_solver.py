"""Kernel ridge against dense solves and against fits that leave one row out, in float64."""

import pytest
import torch
from emulated_graphs import Waited

from r2f_ext.errors import R2FError
from r2f_ext.kernel_solver import RidgeSystem, best_ridge, fit_by_leave_one_out


def problem(n=9, k=3):
    """A kernel [n, n] of full rank, and values [n, k]."""
    rows = torch.randn(n, n + 3).double()
    return rows @ rows.mT, torch.randn(n, k).double()


def without(i, n):
    return [j for j in range(n) if j != i]


def test_it_solves_the_system():
    kernel, wanted = problem()
    expected = torch.linalg.solve(kernel + 0.3 * torch.eye(9), wanted)
    torch.testing.assert_close(RidgeSystem.of(kernel.clone(), 0.3).solve(wanted), expected)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_predictions_are_the_same_whichever_side_is_solved_for(rows):
    kernel, wanted = problem()
    features = torch.randn(rows, 9).double()
    expected = features @ torch.linalg.solve(kernel + 0.3 * torch.eye(9), wanted)
    system = RidgeSystem.of(kernel.clone(), 0.3)
    torch.testing.assert_close(system.predictions(features, wanted), expected)
    assert system.predictions(features.float(), wanted).dtype == torch.float32


def test_leave_one_out_errors_are_those_of_fits_without_the_row():
    kernel, wanted = problem()
    system = RidgeSystem.of(kernel.clone(), 0.3)
    errors = system.leave_one_out_errors(system.solve(wanted))
    for i in range(9):
        rest = without(i, 9)
        dual = torch.linalg.solve(kernel[rest][:, rest] + 0.3 * torch.eye(8), wanted[rest])
        torch.testing.assert_close(errors[i], wanted[i] - kernel[i, rest] @ dual)


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(R2FError, match="2 unknowns is not positive definite: choose a larger lambda"):
        RidgeSystem.of(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.1)


def test_the_best_ridge_is_that_of_the_highest_score():
    kernel, wanted = problem()
    fit, rest, ridges = slice(0, 6), slice(6, 9), (1e-3, 0.1, 10.0)

    def score(predicted, true):
        return -float((predicted - true).square().mean())

    scores = []
    for ridge in ridges:
        dual = torch.linalg.solve(kernel[fit, fit] + ridge * torch.eye(6), wanted[fit])
        scores.append(score(kernel[rest, fit] @ dual, wanted[rest]))
    held_out = kernel[rest, fit], wanted[rest]
    ridge, best = best_ridge(kernel[fit, fit], wanted[fit], held_out, ridges, score)
    assert ridge == ridges[scores.index(max(scores))] and best == pytest.approx(max(scores))


def test_a_score_of_nan_is_never_the_best():
    kernel, wanted = problem()
    scores = iter((0.1, float("nan"), 0.2, float("nan")))
    held_out = kernel, wanted
    ridges = (1.0, 2.0, 3.0, 4.0)
    assert best_ridge(kernel, wanted, held_out, ridges, lambda *args: next(scores)) == (3.0, 0.2)
    assert best_ridge(kernel, wanted, held_out, ridges, lambda *args: float("nan")) == (4.0, float("-inf"))


def centred(kernel, wanted):
    kernel = kernel - kernel.mean(0) - kernel.mean(0)[:, None] + kernel.mean()
    return kernel, wanted - wanted.mean(0)


def test_one_eigendecomposition_gives_the_fits_without_each_row():
    """Kernel ridge with an undamped constant, written out for n - 1 rows: [[K + lambda I, 1], [1, 0]]."""
    kernel, wanted = centred(*problem())
    largest = float(torch.linalg.eigvalsh(kernel)[-1])
    mean_squares = {}
    for share in (1e-4, 1e-2, 1.0):
        dual, errors = fit_by_leave_one_out(kernel, wanted, (share,))
        mean_squares[share] = float(errors.square().mean())
        for i in range(9):
            rest = without(i, 9)
            system = torch.zeros(9, 9).double()
            system[:8, :8] = kernel[rest][:, rest] + share * largest * torch.eye(8)
            system[8, :8] = system[:8, 8] = 1
            solution = torch.linalg.solve(system, torch.cat([wanted[rest], torch.zeros(1, 3)]))
            predicted = kernel[i, rest] @ solution[:8] + solution[8]
            torch.testing.assert_close(errors[i], wanted[i] - predicted)
        torch.testing.assert_close(kernel @ dual + share * largest * dual, wanted)
    best = min(mean_squares, key=mean_squares.__getitem__)
    chosen = fit_by_leave_one_out(kernel, wanted, tuple(mean_squares))
    assert torch.equal(chosen[0], fit_by_leave_one_out(kernel, wanted, (best,))[0])


def test_many_columns_choose_lambda_by_combinations_of_them():
    """The choice by SKETCH combinations of 500 columns is that of all columns, and the fit is of all."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    wanted = features @ torch.randn(20, 500, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 500, generator=generator, dtype=torch.float64)
    for level in (0.01, 3.0, 30.0):
        kernel, columns = centred(features @ features.T, wanted + level * noise)
        shares = (1e-6, 1e-3, 1e-1, 1.0, 10.0)
        errors = {share: fit_by_leave_one_out(kernel, columns, (share,))[1].square().mean() for share in shares}
        best = min(errors, key=errors.__getitem__)
        dual, _ = fit_by_leave_one_out(kernel, columns, shares)
        assert torch.equal(dual, fit_by_leave_one_out(kernel, columns, (best,))[0])


def test_a_regression_without_finite_errors_is_refused():
    kernel, wanted = centred(*problem())
    for factor in (float("nan"), 1e200):  # the squares of the second one's errors are infinite
        with pytest.raises(R2FError, match="no finite leave-one-out error"):
            fit_by_leave_one_out(kernel, wanted * factor, (1e-2, 1.0))


def test_lambdas_are_compared_without_waiting_for_each():
    """On a GPU every wait leaves it idle. Three are left, however many there are: the eigendecomposition's, the copy of
    the lambdas, and whether there is a finite error at all."""
    updates = torch.randn(30, 8, dtype=torch.float64)
    kernel = updates @ updates.T
    kernel = kernel - kernel.mean(0) - kernel.mean(0)[:, None] + kernel.mean()
    wanted = torch.randn(30, 3, dtype=torch.float64)
    for count in (2, 12):
        with Waited() as waited:
            fit_by_leave_one_out(kernel, wanted - wanted.mean(0), [10.0**-k for k in range(count)])
        assert waited.count <= 3
