"""lora_grad against the best plain PyTorch form.

python benchmarks/ops/bench_lora_grad.py [--device cuda] [--json FILE]
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

from r2f_ext.ops import backend_of, lora_grad

SHAPES = [(64, 65, 128, 384), (32, 197, 768, 768), (16, 197, 768, 3072)]  # P, N, d_in, d_out
RANKS = [1, 2, 4, 8, 16, 32, 64]


def plain_forms(x: Tensor, delta: Tensor, A: Tensor, B: Tensor | None) -> dict[str, Callable[[], object]]:
    """The same results in plain PyTorch, each in its own way; contiguous, as ours are."""

    def small_first() -> object:  # (U^T delta)^T
        grad_B = ((x @ A.mT).mT @ delta).mT.contiguous()
        return grad_B if B is None else (grad_B, (delta @ B).mT @ x)

    def transposed() -> object:  # (U^T delta)^T, left transposed
        grad_B = ((x @ A.mT).mT @ delta).mT
        return grad_B if B is None else (grad_B, (delta @ B).mT @ x)

    def direct() -> object:  # delta^T U
        grad_B = delta.mT @ (x @ A.mT)
        return grad_B if B is None else (grad_B, (delta @ B).mT @ x)

    def einsum() -> object:
        grad_B = torch.einsum("pno,pnr->por", delta, torch.einsum("pni,ri->pnr", x, A))
        return grad_B if B is None else (grad_B, torch.einsum("pnr,pni->pri", torch.einsum("pno,or->pnr", delta, B), x))

    return {"(UᵀD)ᵀ": small_first, "(UᵀD)ᵀ view": transposed, "DᵀU": direct, "einsum": einsum}


def measure(device: str, dtype: torch.dtype, shape: tuple[int, ...], rank: int, with_B: bool, rounds: int) -> dict:
    P, N, d_in, d_out = shape
    options = {"device": device, "dtype": dtype}
    x, delta, A = (
        torch.randn(P, N, d_in, **options),
        torch.randn(P, N, d_out, **options),
        torch.randn(rank, d_in, **options),
    )
    B = torch.randn(d_out, rank, **options) if with_B else None
    functions = {"ours": lambda: lora_grad(x, delta, A, B, scale=1.0), **plain_forms(x, delta, A, B)}
    medians = interleaved_medians(functions, rounds, device)
    rival, ratio = ratio_to_best_rival(medians)
    gigabytes = (x.numel() + delta.numel()) * x.element_size() / 1e9
    return {
        "shape": list(shape), "rank": rank, "dtype": str(dtype).removeprefix("torch."), "B": with_B,
        "ours_ms": medians["ours"], "best_plain_ms": medians[rival], "best_plain": rival, "ratio": ratio,
        "GB_per_s": gigabytes / (medians["ours"] / 1e3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    backend = backend_of("lora_grad", arguments.device)
    print(f"backend {backend}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("   P, N, d_in, d_out   r    dtype    B  ours ms  plain ms  ratio   GB/s  best plain")
    cases = [(shape, rank, torch.float32, False) for shape in SHAPES for rank in RANKS]
    cases += [(shape, 8, torch.float32, True) for shape in SHAPES]
    cases += [(shape, 8, dtype, False) for shape in SHAPES for dtype in (torch.float64, torch.bfloat16)]
    rows = []
    for shape, rank, dtype, with_B in cases:
        row = measure(arguments.device, dtype, shape, rank, with_B, arguments.rounds)
        rows.append(row)
        print(
            f"{', '.join(map(str, shape)):>20} {rank:3} {row['dtype']:>8} {'yes' if with_B else 'zero':>4} "
            f"{row['ours_ms']:8.3f} {row['best_plain_ms']:9.3f} {row['ratio']:6.2f} "
            f"{row['GB_per_s']:6.1f}  {row['best_plain']}",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
