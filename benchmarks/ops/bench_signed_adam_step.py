"""signed_adam_step_ against torch.optim.Adam with sign_ and clamp_."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import Functions
from torch import Tensor

from r2f_ext.ops import signed_adam_step_

pytestmark = pytest.mark.benchmark(group="signed_adam_step_")
SHAPES = [(1, 3, 32, 32), (100, 1, 32, 32), (8, 3, 224, 224), (64, 3, 224, 224)]


def plain_form(image: Tensor, gradient: Tensor, **options: Any) -> Callable[[], Tensor]:
    pixels = image.clone().requires_grad_()
    # A step can be captured as a CUDA graph only if its counter is on the device.
    optimizer = torch.optim.Adam([pixels], lr=0.05, capturable=image.is_cuda, **options)
    pixels.grad = gradient.clone()

    def step() -> Tensor:
        pixels.grad.sign_()
        optimizer.step()
        with torch.no_grad():
            return pixels.clamp_(0, 1)

    return step


def our_form(image: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
    pixels, exp_avg, exp_avg_sq = image.clone(), torch.zeros_like(image), torch.zeros_like(image)
    steps = iter(range(1, 10**9))

    def step() -> Tensor:
        signed_adam_step_(pixels, gradient, exp_avg, exp_avg_sq, lr=0.05, step=next(steps))
        return pixels

    return step


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_signed_adam_step(versus: Callable[..., None], device: str, shape: tuple[int, ...]) -> None:
    def make() -> Functions:
        image, gradient = torch.rand(shape, device=device), torch.randn(shape, device=device)
        return {
            "ours": our_form(image, gradient),
            "Adam(foreach=True), sign_, clamp_": plain_form(image, gradient, foreach=True),
            "Adam(fused=True), sign_, clamp_": plain_form(image, gradient, fused=True),
            "Adam(foreach=False), sign_, clamp_": plain_form(image, gradient, foreach=False),
        }

    pixels = torch.Size(shape).numel()  # reads image, gradient and two averages; writes all but the gradient
    versus("signed_adam_step_", list(shape), make, traffic=7 * 4 * pixels)
