"""Newton's steps of several victims, and the damped systems that they solve."""

import torch
from gauss_newton_cases import SHAPE, small_problem, start_near

from r2f_ext.inversion.dense_newton import Local, newton_steps
from r2f_ext.inversion.gauss_newton import _task_of
from r2f_ext.inversion.newton import DAMPINGS
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.update_map import UpdateMap, flat_units


def test_newton_steps_move_each_victim_as_its_own_do():
    target, a, observed, images, labels, subspace = small_problem()
    updates, config = UpdateMap(target, a, SHAPE, 32), GaussNewtonConfig()
    task = _task_of(updates, flat_units(observed), labels, subspace)
    points, both = start_near(images, labels, subspace, 0.02).images.flatten(1), torch.arange(2)
    values = task.update_of(points, both)
    together, reached = newton_steps(task, both, points, values, config)
    torch.testing.assert_close(reached, task.update_of(together, both))
    assert max(task.residuals(reached, both)) < 1e-3 * min(task.residuals(values, both))
    for victim in range(2):
        rows = both[victim : victim + 1]
        alone, _ = newton_steps(task, rows, points[rows], values[rows], config)
        torch.testing.assert_close(alone[0], together[victim], rtol=0, atol=1e-9)


def test_the_factors_solve_the_damped_systems_and_say_where_there_is_none():
    torch.manual_seed(0)
    jacobian = torch.randn(6, 20, dtype=torch.float64)
    local, gram = Local.of(jacobian), jacobian @ jacobian.T
    pulls = local.pulls(torch.randn(1, 20, dtype=torch.float64))
    largest = torch.linalg.eigvalsh(gram)[-1]
    for share, correction in zip(reversed(DAMPINGS), local.corrections(pulls), strict=True):
        expected = torch.linalg.solve(gram + share * largest * torch.eye(6), pulls[0])
        torch.testing.assert_close(correction, expected, rtol=1e-2 * share + 1e-9, atol=1e-9)
    twice = Local.of(torch.cat([jacobian, 3e4 * jacobian]).float())  # singular: little damping has no factor
    solved = twice.corrections(twice.pulls(torch.randn(1, 20)))
    assert solved[-1].isfinite().all() and Local.of(torch.full((2, 3), torch.nan)).factors.isnan().all()
