"""total_variation, forward and backward, against the best plain PyTorch form.

python benchmarks/ops/bench_total_variation.py [--device cuda] [--json FILE]
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

from r2f_ext.ops import total_variation

SHAPES = [(1, 3, 32, 32), (100, 3, 32, 32), (8, 3, 224, 224)]
EPS = 1e-12


def anisotropic(x: Tensor) -> Tensor:
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean((1, 2, 3)) + (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))


def by_diff(x: Tensor) -> Tensor:
    return x.diff(dim=2).abs().mean((1, 2, 3)) + x.diff(dim=3).abs().mean((1, 2, 3))


def norms(x: Tensor) -> Tensor:
    rows, columns = x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]
    by_row, by_column = (torch.linalg.vector_norm(d, 1, (1, 2, 3)) / d[0].numel() for d in (rows, columns))
    return by_row + by_column


def isotropic(x: Tensor) -> Tensor:
    dy = torch.nn.functional.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    dx = torch.nn.functional.pad(x[..., 1:] - x[..., :-1], (0, 1))
    return (dx.square() + dy.square() + EPS).sqrt().mean((1, 2, 3))


def isotropic_by_hypot(x: Tensor) -> Tensor:
    dy = torch.nn.functional.pad(x.diff(dim=2), (0, 0, 0, 1))
    return torch.hypot(torch.nn.functional.pad(x.diff(dim=3), (0, 1)), dy.square().add(EPS).sqrt()).mean((1, 2, 3))


PLAIN: dict[bool, dict[str, Callable[[Tensor], Tensor]]] = {
    False: {"slices": anisotropic, "diff": by_diff, "norms": norms},
    True: {"slices": isotropic, "hypot": isotropic_by_hypot},
}


def measure(shape: tuple[int, ...], is_isotropic: bool, device: str) -> dict[str, Any]:
    images = torch.rand(shape, device=device).requires_grad_()

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(images).sum(), images)

    functions = {"ours": both(lambda x: total_variation(x, is_isotropic))}
    functions |= {name: both(form) for name, form in PLAIN[is_isotropic].items()}
    for name, function in functions.items():
        torch.testing.assert_close(function(), functions["slices"](), rtol=1e-4, atol=1e-7, msg=name)
    medians = interleaved_medians(functions, 25, device, calls=3)
    name = f"total_variation, {'isotropic' if is_isotropic else 'anisotropic'}"
    traffic = 3 * 4 * images.numel()  # read by each pass, written by the backward
    return row(name, list(shape), torch.float32, medians, device, traffic)


def main() -> None:
    asked = options(__doc__)
    rows = []
    for shape in SHAPES:
        for is_isotropic in (False, True):
            rows.append(measure(shape, is_isotropic, asked.device))
            say(rows[-1])
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
