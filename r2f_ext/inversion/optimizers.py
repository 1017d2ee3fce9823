"""Optimizers on pixels for a batch of independent trials: Adam on the gradient or its sign, and L-BFGS.

Each `step` takes the loss and its gradient (slope) at `images` and updates `images` in place.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.ops import signed_adam_step_

Box = tuple[float, float] | None
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam (Kingma and Ba, 2015)
MEMORY = 10  # (step, gradient difference) pairs that L-BFGS stores
SUFFICIENT = 1e-4  # fraction of the predicted decrease that L-BFGS requires (Armijo)
SMALLEST = 2.0**-10  # step length below which L-BFGS restarts from the slope


class Optimizer(Protocol):
    """Moves images step by step.

    Attributes:
        state: tensors that, together with `images`, determine all later steps.
    """

    state: dict[str, Tensor]

    def step(self, images: Tensor, loss: Tensor, slope: Tensor, size: float, count: int) -> None:
        """Move images [T, ...], given the loss [T] and slope [T, ...] there; `count` numbers steps from 1."""
        ...


class Adam:
    """`ops.signed_adam_step_`: Adam on the slope or its sign (Geiping et al., 2020), then projection onto the box."""

    def __init__(self, images: Tensor, box: Box, sign: bool) -> None:
        self.box, self.sign = box, sign
        self.state = {"exp_avg": torch.zeros_like(images), "exp_avg_sq": torch.zeros_like(images)}

    def step(self, images: Tensor, loss: Tensor, slope: Tensor, size: float, count: int) -> None:
        low, high = (None, None) if self.box is None else self.box
        signed_adam_step_(
            images,
            slope,
            self.state["exp_avg"],
            self.state["exp_avg_sq"],
            lr=size,
            step=count,
            betas=BETAS,
            eps=EPS,
            low=low,
            high=high,
            sign=self.sign,
        )


class LBFGS:
    """Limited-memory BFGS (Nocedal and Wright, 2006, Algorithm 7.4); every trial has its own memory and line search.

    Each step uses one evaluation for all trials: a trial whose loss fell enough (Armijo) continues from the new point,
    another halves its step from the old one. Points are projected onto the box. `size` is the largest change of a pixel
    in a trial's first step; later steps have length 1 in the scale of BFGS, and change no pixel by more than 10 `size`.
    """

    def __init__(self, images: Tensor, box: Box) -> None:
        self.box = box
        trials, pixels = len(images), images[0].numel()
        zeros, memory = images.new_zeros(trials, pixels), images.new_zeros(MEMORY, trials, pixels)
        self.state = {
            "base": zeros, "slope": zeros.clone(), "direction": zeros.clone(),
            "loss": images.new_full((trials,), float("inf")), "length": images.new_ones(trials),
            "moves": memory, "changes": memory.clone(), "curvature": images.new_zeros(MEMORY, trials),
        }  # fmt: skip

    def step(self, images: Tensor, loss: Tensor, slope: Tensor, size: float, count: int) -> None:
        s = self.state
        point, slope = images.flatten(1), slope.flatten(1)
        move = point - s["base"]
        predicted = torch.zeros_like(loss) if count == 1 else (s["slope"] * move).sum(1)
        accepted = (loss <= s["loss"] + SUFFICIENT * predicted).to(slope.dtype)  # False for NaN
        go = accepted.bool()[:, None]
        if count > 1:
            self._remember(move, slope - s["slope"], go)
        s["base"], s["slope"] = torch.where(go, point, s["base"]), torch.where(go, slope, s["slope"])
        s["loss"] = torch.where(go[:, 0], loss, s["loss"])
        s["length"] = torch.where(go[:, 0], 1.0, s["length"] / 2)
        failed = (s["length"] < SMALLEST)[:, None]
        s["curvature"] = torch.where(failed.mT, 0.0, s["curvature"])
        s["length"] = torch.where(failed[:, 0], 1.0, s["length"])
        s["direction"] = torch.where(go | failed, self._direction(size), s["direction"])
        target = s["base"] + s["length"][:, None] * s["direction"]
        images.copy_((target if self.box is None else target.clamp(*self.box)).view_as(images))

    def _remember(self, move: Tensor, change: Tensor, go: Tensor) -> None:
        """Store the newest pair first; pairs without positive curvature are skipped."""
        s = self.state
        product = (move * change).sum(1)
        keep = go[:, 0] & (product > 1e-10 * move.norm(dim=1) * change.norm(dim=1))
        for name, new in (("moves", move), ("changes", change), ("curvature", 1 / product)):
            pushed = torch.cat([new[None], s[name][:-1]])
            s[name] = torch.where(keep.view(1, -1, *[1] * (new.ndim - 1)), pushed, s[name])

    def _direction(self, size: float) -> Tensor:
        """The two-loop recursion. Curvature 0 marks an empty slot; without any pair, the slope scaled to `size`."""
        s = self.state
        q, alphas = s["slope"].clone(), []
        for move, change, curvature in zip(s["moves"], s["changes"], s["curvature"], strict=True):
            alphas.append(curvature * (move * q).sum(1))
            q -= alphas[-1][:, None] * change
        newest = s["changes"][0].square().sum(1) * s["curvature"][0]
        empty = (newest == 0)[:, None]
        r = q / torch.where(empty[:, 0], 1.0, newest)[:, None]
        for move, change, curvature, alpha in reversed(
            list(zip(s["moves"], s["changes"], s["curvature"], alphas, strict=True))
        ):
            r += (alpha - curvature * (change * r).sum(1))[:, None] * move
        largest = r.abs().amax(1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
        return -r * torch.where(empty, size / largest, (10 * size / largest).clamp_max(1.0))
