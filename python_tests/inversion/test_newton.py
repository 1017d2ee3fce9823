"""The loop and the damped steps that the dense and the matrix-free search share, on maps small enough to follow."""

import pytest
import torch

from r2f_ext.inversion.newton import Search, Steps, descend, run_search


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


class Script(Steps):
    """Moves to given residuals, one after the other."""

    def __init__(self, residuals, again=False):
        self.residuals, self.again, self.begun = iter(residuals), again, 1

    def move(self, point, value):
        point = torch.full((1, 1), next(self.residuals), dtype=torch.float64)
        return point, point

    def restart(self):
        self.begun += 1
        return self.again


def searched(script, passes=10, patience=2) -> Search:
    start, observed = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return run_search(lambda points: points, script, observed, start, 1, passes, patience)


def test_the_best_point_is_returned_not_the_last():
    found = searched(Script([0.3, 0.6, 0.9]))
    assert (found.residual, float(found.image), found.passes) == (0.3, 0.3, 3)


def test_a_search_without_progress_begins_again_or_ends():
    ends, again = Script([1.0] * 10), Script([1.0] * 10, again=True)
    assert searched(ends).passes == 2 and searched(again).passes == 10
    assert (ends.begun, again.begun) == (2, 6)


def test_no_pass_begins_after_the_time_limit():
    start, observed = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = run_search(lambda points: points, Script([0.5] * 10), observed, start, 1, 10, 5, seconds=0.0)
    assert found.passes == 0 and found.residual == found.start_residual == 1 and found.stopped
    assert not searched(Script([0.5] * 10)).stopped
    assert not run_search(lambda points: points, Script([]), observed, 0 * start, 1, 10, 5, seconds=0.0).stopped
