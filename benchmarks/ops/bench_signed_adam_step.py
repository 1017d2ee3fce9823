"""signed_adam_step_ against torch.optim.Adam with sign_ and clamp_.

python benchmarks/ops/bench_signed_adam_step.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, ratio_to_best_rival, write_json

from r2f_ext.ops import backend_of, signed_adam_step_

SHAPES = [(1, 3, 32, 32), (100, 1, 32, 32), (8, 3, 224, 224), (64, 3, 224, 224)]


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


def measure(shape: tuple[int, ...], device: str, rounds: int, bandwidth: float) -> dict:
    image, gradient = torch.rand(shape, device=device), torch.randn(shape, device=device)
    functions = {
        "ours": our_form(image, gradient),
        "for-loop": plain_form(image, gradient, foreach=False),
        "foreach": plain_form(image, gradient, foreach=True),
        "fused": plain_form(image, gradient, fused=True),
    }
    medians = interleaved_medians(functions, rounds, device, calls=5)
    rival, ratio = ratio_to_best_rival(medians)
    traffic = 7 * 4 * image.numel()  # reads image, gradient and two averages; writes all but the gradient
    return {
        "name": "signed_adam_step_", "shape": list(shape), "dtype": "float32", "device": device,
        "ours_ms": medians["ours"], "baseline": f"torch.optim.Adam {rival}, sign_, clamp_",
        "baseline_ms": medians[rival], "ratio": ratio,
        "roofline_fraction": traffic / (medians["ours"] / 1e3) / bandwidth,
    }  # fmt: skip


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy of 340 MB reads and writes."""
    a, b = torch.ones(85_000_000, device=device), torch.ones(85_000_000, device=device)
    medians = interleaved_medians({"copy": lambda: b.copy_(a)}, 7, device)
    return 2 * 4 * a.numel() / (medians["copy"] / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth(arguments.device)
    backend = backend_of("signed_adam_step_", arguments.device)
    print(
        f"backend {backend}, {torch.get_num_threads()} threads, torch {torch.__version__}, copy {bandwidth / 1e9:.1f} GB/s"
    )
    print("           shape  ours ms  plain ms  ratio  of copy  best plain")
    rows = []
    for shape in SHAPES:
        row = measure(shape, arguments.device, arguments.rounds, bandwidth)
        rows.append(row)
        print(
            f"{'x'.join(map(str, shape)):>16} {row['ours_ms']:8.3f} {row['baseline_ms']:9.3f} {row['ratio']:6.2f} "
            f"{row['roofline_fraction']:8.2f}  {row['baseline']}",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
