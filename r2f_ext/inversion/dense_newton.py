"""Newton steps with dense Jacobians, for several victims at once (docs/methods.md, 3f; `newton` gives the reasons)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.inversion.newton import DAMPINGS, SOLVED
from r2f_ext.inversion.task import GaussNewtonConfig, Task
from r2f_ext.linalg import largest_eigenvalues, precise_gram
from r2f_ext.pairs.memory import budget


@dataclass(frozen=True)
class Local:
    """The Jacobian at one point [q, R], and the Cholesky factors of J^T J + damping for all DAMPINGS [k, q, q],
    float64, the least damped first; NaN where one does not exist to working precision."""

    jacobian: Tensor
    factors: Tensor

    @staticmethod
    def of(jacobian: Tensor) -> Local:
        gram = precise_gram(jacobian)
        if not bool(gram.isfinite().all()):
            gram = torch.full_like(gram, torch.nan)
        dampings = gram.new_tensor(DAMPINGS).flip(0) * largest_eigenvalues(gram[None])
        damped = gram + dampings[:, None, None] * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factors, failed = torch.linalg.cholesky_ex(damped)
        return Local(jacobian, torch.where((failed > 0)[:, None, None], torch.nan, factors))

    def pulls(self, errors: Tensor) -> Tensor:
        """J^T r of errors [n, R]: [n, q] float64."""
        return (errors @ self.jacobian.T).double()

    def corrections(self, pulls: Tensor) -> Tensor:
        """(J^T J + damping)^-1 J^T r of each damping [k, q], for pulls [k, q], or [1, q] for all."""
        return torch.cholesky_solve(pulls.expand(len(self.factors), -1)[:, :, None], self.factors)[:, :, 0]


def newton_steps(
    task: Task, rows: Tensor, points: Tensor, values: Tensor, config: GaussNewtonConfig
) -> tuple[Tensor, Tensor]:
    """Damped steps with one Jacobian per victim, from points [n, p] with values [n, R]; returns the last points and
    values.

    Each step uses the smallest damping whose next correction is shorter than `contraction` times the present one (the
    natural monotonicity test, see `newton`). If there is none, the first step uses the damping with the smallest ratio,
    and a later step ends the steps of that victim. Points are not clamped to [0, 1], because clamped steps stop at
    points that are not solutions.
    """
    basis, observed = task.subspace.basis, task.observed[rows]
    locals_ = [Local.of(task.jacobian_of(int(victim), point)) for victim, point in zip(rows, points, strict=True)]
    pulls = torch.stack([own.pulls((v - o)[None])[0] for own, v, o in zip(locals_, values, observed, strict=True)])
    going = torch.ones(len(rows), dtype=torch.bool, device=points.device)
    every = torch.arange(len(rows), device=points.device)
    solved = SOLVED * task.layers**0.5
    for step in range(config.steps):
        now = torch.stack([own.corrections(pull[None]) for own, pull in zip(locals_, pulls, strict=True)])  # [n, k, q]
        trials = points[:, None] - now.to(basis.dtype) @ basis.T
        tried = task.update_of(trials.flatten(0, 1), rows.repeat_interleave(trials.shape[1])).unflatten(
            0, now.shape[:2]
        )
        pulled = torch.stack([own.pulls(v - o) for own, v, o in zip(locals_, tried, observed, strict=True)])
        after = torch.stack([own.corrections(each) for own, each in zip(locals_, pulled, strict=True)])
        ratios = (after.norm(dim=2) / now.norm(dim=2)).nan_to_num(nan=torch.inf)
        good = ratios < config.contraction
        chosen = torch.where(good.any(1), good.int().argmax(1), ratios.argmin(1))
        going = going & (good.any(1) | ((step == 0) & ratios.isfinite().any(1)))
        mine = going[:, None]
        points = torch.where(mine, trials[every, chosen], points)
        values = torch.where(mine, tried[every, chosen], values)
        pulls = torch.where(mine, pulled[every, chosen], pulls)
        going = going & ((values - observed).norm(dim=1) >= solved)
        if not bool(going.any()):
            break
    return points, values


def newtons_together(device: torch.device, directions: int, numbers: int) -> int:
    """The number of victims whose Jacobians and factors fit into memory; arguments as for `victims_together`."""
    each = 8 * directions * (numbers + (len(DAMPINGS) + 2) * directions)
    return max(1, budget(device) // each)
