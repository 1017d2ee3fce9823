"""signed_adam_step_ against torch.optim.Adam with sign_ and clamp_.

python benchmarks/ops/bench_signed_adam_step.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, options, row, say, write_json

from r2f_ext.ops import signed_adam_step_

SHAPES = [(1, 3, 32, 32), (100, 1, 32, 32), (8, 3, 224, 224), (64, 3, 224, 224)]
ROUNDS = 15


def plain_form(image: Tensor, gradient: Tensor, **options: bool) -> Callable[[], object]:
    pixels = image.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=0.05, **options)
    pixels.grad = gradient.clone()

    def step() -> None:
        pixels.grad.sign_()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)

    return step


def our_form(image: Tensor, gradient: Tensor) -> Callable[[], object]:
    pixels, exp_avg, exp_avg_sq = image.clone(), torch.zeros_like(image), torch.zeros_like(image)
    steps = iter(range(1, 10**9))
    return lambda: signed_adam_step_(pixels, gradient, exp_avg, exp_avg_sq, lr=0.05, step=next(steps))


def measure(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    image, gradient = torch.rand(shape, device=device), torch.randn(shape, device=device)
    functions = {
        "ours": our_form(image, gradient),
        "Adam(foreach=False), sign_, clamp_": plain_form(image, gradient, foreach=False),
        "Adam(foreach=True), sign_, clamp_": plain_form(image, gradient, foreach=True),
        "Adam(fused=True), sign_, clamp_": plain_form(image, gradient, fused=True),
    }
    traffic = 7 * 4 * image.numel()  # reads image, gradient and two averages; writes all but the gradient
    medians = interleaved_medians(functions, ROUNDS, device, calls=5)
    return row("signed_adam_step_", list(shape), torch.float32, medians, device, traffic)


def main() -> None:
    asked = options(__doc__)
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, asked.device))
        say(rows[-1])
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
