"""The loop and the damped steps that the dense and the matrix-free search share, on maps small enough to follow."""

import pytest
import torch

from r2f_ext.inversion.newton import Search, descend, run_search


class Linear:
    """z(x) = M x, linearised at any point."""

    def __init__(self, matrix, batch_size):
        self.matrix, self.batch_size = matrix, batch_size
        self.curvature, self.axes = torch.linalg.eigh(matrix.T @ matrix)

    def pull(self, errors):
        return errors @ self.matrix @ self.axes

    def moved(self, point, correction):
        return point - correction @ self.axes.T


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_a_linear_map_is_solved_in_few_steps_however_many_dampings_are_tried_at_once(batch_size):
    torch.manual_seed(0)
    matrix, image = torch.randn(9, 4, dtype=torch.float64), torch.rand(1, 4, dtype=torch.float64)
    update_of = lambda points: points @ matrix.T  # noqa: E731
    start, observed = torch.zeros(1, 4, dtype=torch.float64), update_of(image)[0]
    tried = []

    def counted(points):
        tried.append(len(points))
        return update_of(points)

    point, value = descend(Linear(matrix, batch_size), counted, observed, start, update_of(start), 4, 0.75, 1e-9)
    torch.testing.assert_close(point, image)
    torch.testing.assert_close(value[0], observed)
    assert tried[0] == batch_size


@pytest.mark.parametrize("batch_size", [1, 12])
def test_trials_that_are_not_numbers_are_never_chosen(batch_size):
    matrix = torch.eye(3, dtype=torch.float64)
    start, observed = torch.zeros(1, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    broken = lambda points: points * torch.nan  # noqa: E731
    point, value = descend(Linear(matrix, batch_size), broken, observed, start, start, 3, 0.75, 0.0)
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
    return run_search(lambda points: points, move, observed, begin, 1, passes=10, patience=2)


def test_the_best_point_is_returned_not_the_last():
    found = searched(script(0.3, 0.6, 0.9))
    assert (found.residual, float(found.image), found.passes) == (0.3, 0.3, 3) and found.seconds > 0


def test_a_search_ends_without_progress_at_its_last_pass_or_where_nothing_is_left_to_find():
    assert searched(script(*[1.0] * 10)).passes == 2
    assert searched(script(*(0.7**k for k in range(1, 12)))).passes == 10
    assert searched(script(), start=0.0).passes == 0
