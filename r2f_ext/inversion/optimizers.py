"""Optimizers on pixels, a batch of independent trials each: Adam on the gradient or its sign, and L-BFGS.

Each `step` gets the loss and slope at `images` and moves `images` in place to where they are wanted next.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from r2f_ext.ops import signed_adam_step_

Box = tuple[float, float] | None
MEMORY = 10  # pairs that L-BFGS remembers
SUFFICIENT = 1e-4  # share of the promised decrease that L-BFGS must see (Armijo)
SMALLEST = 2.0**-10  # shorter steps mean that the direction is no good


class Optimizer(Protocol):
    """Moves images step by step.

    Attributes:
        state: tensors that, with `images`, hold all that a later step depends on.
    """

    state: dict[str, Tensor]

    def step(self, images: Tensor, loss: Tensor, slope: Tensor, size: float, count: int) -> None:
        """Move images [T, ...], given loss [T] and slope [T, ...] there; count is 1 at the first step."""
        ...


class Adam:
    """`ops.signed_adam_step_`: Adam, on the slope's sign where asked (Geiping et al. 2020), then the box."""

    def __init__(self, images: Tensor, box: Box, sign: bool) -> None:
        self.box, self.sign = box, sign
        self.state = {"exp_avg": torch.zeros_like(images), "exp_avg_sq": torch.zeros_like(images)}

    def step(self, images: Tensor, loss: Tensor, slope: Tensor, size: float, count: int) -> None:
        low, high = (None, None) if self.box is None else self.box
        average, square = self.state["exp_avg"], self.state["exp_avg_sq"]
        signed_adam_step_(images, slope, average, square, lr=size, step=count, low=low, high=high, sign=self.sign)


class LBFGS:
    """Limited-memory BFGS (Nocedal and Wright, 2006, Algorithm 7.4), every trial with its own memory and line search.

    One evaluation a step serves all trials: a trial whose loss fell enough (Armijo) goes on from there, another halves
    its step from where it was. The box is a projection; `size` is the largest change of a pixel in a trial's first
    step, later ones have length 1 in BFGS's own scale, no pixel more than ten times `size`.
    """

    def __init__(self, images: Tensor, box: Box) -> None:
        self.box = box
        trials, pixels = len(images), images[0].numel()
        room, memory = images.new_zeros(trials, pixels), images.new_zeros(MEMORY, trials, pixels)
        self.state = {
            "base": room, "slope": room.clone(), "direction": room.clone(),
            "loss": images.new_full((trials,), float("inf")), "length": images.new_ones(trials),
            "moves": memory, "changes": memory.clone(), "curvature": images.new_zeros(MEMORY, trials),
        }  # fmt: skip

    def step(self, images: Tensor, loss: Tensor, slope: Tensor, size: float, count: int) -> None:
        s = self.state
        point, slope = images.flatten(1), slope.flatten(1)
        move = point - s["base"]
        promised = torch.zeros_like(loss) if count == 1 else (s["slope"] * move).sum(1)
        accepted = (loss <= s["loss"] + SUFFICIENT * promised).to(slope.dtype)  # NaN is not
        go = accepted.bool()[:, None]
        if count > 1:
            self._remember(move, slope - s["slope"], go)
        s["base"], s["slope"] = torch.where(go, point, s["base"]), torch.where(go, slope, s["slope"])
        s["loss"] = torch.where(go[:, 0], loss, s["loss"])
        s["length"] = torch.where(go[:, 0], 1.0, s["length"] / 2)
        lost = (s["length"] < SMALLEST)[:, None]
        s["curvature"] = torch.where(lost.mT, 0.0, s["curvature"])
        s["length"] = torch.where(lost[:, 0], 1.0, s["length"])
        s["direction"] = torch.where(go | lost, self._direction(size), s["direction"])
        target = s["base"] + s["length"][:, None] * s["direction"]
        images.copy_((target if self.box is None else target.clamp(*self.box)).view_as(images))

    def _remember(self, move: Tensor, change: Tensor, go: Tensor) -> None:
        """Newest first; pairs without positive curvature are left out."""
        s = self.state
        product = (move * change).sum(1)
        keep = go[:, 0] & (product > 1e-10 * move.norm(dim=1) * change.norm(dim=1))
        for name, new in (("moves", move), ("changes", change), ("curvature", 1 / product)):
            pushed = torch.cat([new[None], s[name][:-1]])
            s[name] = torch.where(keep.view(1, -1, *[1] * (new.ndim - 1)), pushed, s[name])

    def _direction(self, size: float) -> Tensor:
        """The two-loop recursion; curvature 0 marks an empty place. Without memory: the slope, `size` at most."""
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
