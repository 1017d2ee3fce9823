"""Preconditioned L-BFGS on the misfit of an image's update (docs/methods.md, 3f).

The misfit has narrow and curved valleys: J^T J has eigenvalues over many orders of magnitude, and a long step of
Gauss-Newton leaves the valley. In coordinates in which J^T J, damped, is the identity, many short steps with exact
gradients follow it. Such a step costs about a two-hundredth of a Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from r2f_ext.linalg import precise_gram

DAMPING = 1e-3  # added to J^T J, relative to its largest eigenvalue; with 1e-5 and less the steps leave the valley
STEPS = 400  # of one pass; about twice the time of the Jacobian
MEMORY = 60  # pairs of steps and changes of the gradient that L-BFGS keeps

Misfit = Callable[[Tensor], Tensor]  # image [p] -> |z(x) - z*|^2 / 2, differentiable


def preconditioned_descent(
    misfit: Misfit, point: Tensor, jacobian: Tensor, basis: Tensor, steps: int = STEPS
) -> Tensor:
    """The point [p] after up to `steps` steps of L-BFGS (Liu and Nocedal 1989) from point [p], along basis [p, q].

    Pixels may leave [0, 1]. Evaluations of the misfit are limited to five quarters of the steps. The point is returned
    as it is if the Jacobian is zero or not finite, or if the descent ends at numbers that are not finite.

    Args:
        jacobian: [q, R], dz along the columns of `basis` at the point.
    """
    gram = precise_gram(jacobian)
    if not 0 < float(gram.trace()) < float("inf"):
        return point
    curvature, axes = torch.linalg.eigh(gram)
    scales = (curvature.clamp_min(0) + DAMPING * curvature[-1]).rsqrt()
    directions = (basis.double() @ (axes * scales)).to(basis.dtype)

    def moved(moves: np.ndarray) -> Tensor:
        return point + directions @ torch.from_numpy(moves).to(directions)

    def evaluate(moves: np.ndarray) -> tuple[float, np.ndarray]:
        image = moved(moves).requires_grad_()
        loss = misfit(image)
        (slope,) = torch.autograd.grad(loss, [image])
        return float(loss.detach()), (slope @ directions).double().cpu().numpy()

    options = {"maxiter": steps, "maxfun": steps + steps // 4, "maxcor": MEMORY, "ftol": 0.0, "gtol": 0.0}
    start = np.zeros(directions.shape[1])
    found = moved(minimize(evaluate, start, jac=True, method="L-BFGS-B", options=options).x)
    return found if bool(torch.isfinite(found).all()) else point
