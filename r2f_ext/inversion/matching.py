"""Gradient matching (Geiping et al. 2020): signed Adam on pixels, all victims as one batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r2f_ext.capture import Capture
from r2f_ext.errors import R2FError
from r2f_ext.inversion.objectives import Objective, total_variation
from r2f_ext.ops import signed_adam_step_
from r2f_ext.types import Reconstruction, Target

Prior = Callable[[Tensor, int], Tensor]  # images [n, c, h, w] and step -> a gradient on them


@dataclass(frozen=True)
class MatchingConfig:
    """Steps of signed Adam; step size in pixels of [0, 1], a tenth of it after 3/8, 5/8 and 7/8; weight of TV."""

    steps: int = 120
    step_size: float = 0.05
    tv_weight: float = 0.05


def match(
    target: Target,
    objective: Objective,
    start: Tensor,
    labels: Tensor,
    config: MatchingConfig,
    route: str,
    why: str,
    on_step: Callable[[], None] = lambda: None,
    prior: Prior | None = None,
) -> Reconstruction:
    """Minimise objective + TV over the images of V victims at once; each victim keeps its best image.

    Args:
        start: [V, c, h, w] in [0, 1].
        labels: [V] int64, taken as known (found by another route).
        on_step: called after each step, for progress bars.
        prior: what adds to the gradient on the images (see `ScoreDistillation.gradient`).

    Raises:
        R2FError: the objective is not finite at the start.
    """
    began = time.perf_counter()
    images = start.clone(memory_format=torch.contiguous_format).requires_grad_()
    exp_avg, exp_avg_sq = (torch.zeros_like(images) for _ in range(2))
    milestones = [config.steps * k // 8 for k in (3, 5, 7)]
    best, best_loss, first_loss = start.clone(), torch.full((len(start),), float("inf"), device=start.device), 0.0
    with Capture(target) as capture:
        for step in range(config.steps + 1):
            gradient = capture(images[:, None], labels[:, None], create_graph=True)
            loss = objective(gradient) + config.tv_weight * total_variation(images)
            if step == 0:
                first_loss = _finite_mean(loss)
            better = loss.detach() < best_loss
            best[better] = images.detach()[better]
            best_loss[better] = loss.detach()[better]
            if step == config.steps:
                break
            (slope,) = torch.autograd.grad(loss.sum(), [images])
            if prior is not None:
                slope = slope + prior(images.detach(), step)
            lr = config.step_size * 0.1 ** sum(step >= milestone for milestone in milestones)
            signed_adam_step_(images, slope, exp_avg, exp_avg_sq, lr=lr, step=step + 1)
            on_step()
    details = {"steps": config.steps, "loss_start": first_loss, "loss_end": float(best_loss.mean())}
    return Reconstruction(route, best, labels, why, time.perf_counter() - began, details)


def _finite_mean(loss: Tensor) -> float:
    if not torch.isfinite(loss).all():
        raise R2FError("the matching objective is not finite: the observed gradient holds NaN or is zero.")
    return float(loss.detach().mean())
