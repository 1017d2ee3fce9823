"""lora_grad against the best plain PyTorch form.

python benchmarks/ops/bench_lora_grad.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, options, row, say, write_json

from r2f_ext.ops import lora_grad

SHAPES = [(64, 65, 128, 384), (32, 197, 768, 768), (16, 197, 768, 3072)]  # P, N, d_in, d_out
RANKS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
ROUNDS = 15


def plain_forms(x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None) -> dict[str, Callable[[], object]]:
    """The same results in plain PyTorch, each in its own way. All but one leave grad_B as a transposed view."""
    columns, shared = A.mT.contiguous(), A.mT.expand(len(x), *A.mT.shape)  # made before the clock starts

    def both(grad_B: Tensor) -> object:
        return grad_B if B is None else (grad_B, (delta @ B).mT @ x)

    return {
        "(UᵀD)ᵀ": lambda: both(((x @ A.mT).mT @ delta).mT),
        "(UᵀD)ᵀ contiguous": lambda: both(((x @ A.mT).mT @ delta).mT.contiguous()),
        "(UᵀD)ᵀ, Aᵀ contiguous": lambda: both(((x @ columns).mT @ delta).mT),
        "(UᵀD)ᵀ, linear": lambda: both((linear(x, A).mT @ delta).mT),
        "((Axᵀ)D)ᵀ": lambda: both(((A @ x.mT) @ delta).mT),
        "bmm": lambda: both(torch.bmm(torch.bmm(x, shared).mT, delta).mT),
        "DᵀU": lambda: both(delta.mT @ (x @ columns)),
        "einsum": lambda: both(torch.einsum("pno,pnr->por", delta, torch.einsum("pni,ri->pnr", x, A))),
    }


def measure(device: str, dtype: torch.dtype, shape: tuple[int, ...], rank: int, with_B: bool = False) -> dict[str, Any]:
    P, N, d_in, d_out = shape
    like = {"device": device, "dtype": dtype}
    x, delta, A = torch.randn(P, N, d_in, **like), torch.randn(P, N, d_out, **like), torch.randn(rank, d_in, **like)
    B = torch.randn(d_out, rank, **like) if with_B else None
    functions = {"ours": lambda: lora_grad(x, delta, A, B, scale=1.0), **plain_forms(x, delta, A, B)}
    elements = x.numel() + delta.numel()  # read once; each meets the rank's numbers of one factor, with B of both
    name = f"lora_grad r={rank}{', with B' if with_B else ''}"
    traffic, flops = elements * x.element_size(), 2 * rank * elements * (2 if with_B else 1)
    return row(name, list(shape), dtype, interleaved_medians(functions, ROUNDS, device), device, traffic, flops)


def main() -> None:
    asked = options(__doc__)
    cases: list[tuple[torch.dtype, tuple[int, ...], int, bool]]
    cases = [(torch.float32, shape, rank, False) for shape in SHAPES for rank in RANKS]
    cases += [(torch.float32, shape, 8, True) for shape in SHAPES]
    cases += [(dtype, shape, 8, False) for shape in SHAPES for dtype in (torch.float64, torch.bfloat16)]
    cases += [(torch.float32, (1, 197, 768, 768), 8, False)]
    rows = []
    for case in cases:
        rows.append(measure(asked.device, *case))
        say(rows[-1])
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
