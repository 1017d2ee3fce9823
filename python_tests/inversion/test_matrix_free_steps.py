"""The loop and the damped steps of the matrix-free search, on maps small enough to follow."""

import pytest
import torch

from r2f_ext.inversion.matrix_free import MatrixFreeConfig, damped_steps, run_search
from r2f_ext.inversion.newton import DAMPINGS, Search


class Linear:
    """z(x) = M x, linearised at any point."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.curvature, self.axes = torch.linalg.eigh(matrix.T @ matrix)

    def pull(self, error):
        return error @ self.matrix @ self.axes

    def moved(self, point, correction):
        return point - correction @ self.axes.T


def test_a_linear_map_is_solved_in_few_steps():
    torch.manual_seed(0)
    matrix, image = torch.randn(9, 4, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64)
    update_of = lambda points: points @ matrix.T  # noqa: E731
    start, observed = torch.zeros(1, 4, dtype=torch.float64), update_of(image)[0]
    config = MatrixFreeConfig(steps=4)
    point, value = damped_steps(Linear(matrix), update_of, observed, start, update_of(start), config, 1e-9)
    torch.testing.assert_close(point, image)
    torch.testing.assert_close(value[0], observed)


def test_a_first_step_that_does_not_contract_takes_the_damping_with_the_smallest_ratio():
    """z(x) = -5 x, linearised as z(x) = x: each step makes the next correction longer, the more damped the less."""
    start, observed = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    tried = []

    def update_of(points):
        tried.append(float(points))
        return -5 * points

    local, config = Linear(torch.eye(1, dtype=torch.float64)), MatrixFreeConfig(steps=3)
    point, value = damped_steps(local, update_of, observed, start, start, config, 0.0)
    assert float(point) == pytest.approx(1 / (1 + max(DAMPINGS))) and float(value) == -5 * float(point)
    assert len(tried) == 2 * len(DAMPINGS)  # the second step tries all, and is not taken


def test_trials_that_are_not_numbers_are_never_chosen():
    matrix = torch.eye(3, dtype=torch.float64)
    start, observed = torch.zeros(1, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    broken = lambda points: points * torch.nan  # noqa: E731
    point, value = damped_steps(Linear(matrix), broken, observed, start, start, MatrixFreeConfig(steps=3), 0.0)
    assert torch.equal(point, start) and torch.equal(value, start)


def script(*residuals):
    """Moves to given residuals, one after the other."""
    left = iter(residuals)

    def move(point, value):
        point = torch.full((1, 1), next(left), dtype=torch.float64)
        return point, point

    return move


def searched(move, start=1.0) -> Search:
    begin, observed = torch.full((1,), start, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return run_search(lambda points: points, move, observed, begin, 1, MatrixFreeConfig(points=10, stalled=2))


def test_the_best_point_is_returned_not_the_last():
    found = searched(script(0.3, 0.6, 0.9))
    assert (found.residual, float(found.image), found.passes) == (0.3, 0.3, 3) and found.seconds > 0


def test_a_search_ends_without_progress_at_its_last_pass_or_where_nothing_is_left_to_find():
    assert searched(script(*[1.0] * 10)).passes == 2
    assert searched(script(*(0.7**k for k in range(1, 12)))).passes == 10
    assert searched(script(), start=0.0).passes == 0
