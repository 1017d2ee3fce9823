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
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, ratio_to_best_rival, write_json

from r2f_ext.ops import backend_of, lora_grad

SHAPES = [(64, 65, 128, 384), (32, 197, 768, 768), (16, 197, 768, 3072)]  # P, N, d_in, d_out
RANKS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


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


def peaks(device: str) -> tuple[float, float]:
    """Bytes per second of a copy (read and written), and float32 operations per second of a matrix product."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source = torch.randn(12_000_000, device=device)
    target = torch.empty_like(source)
    medians = interleaved_medians({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 7, device)
    return 2 * source.numel() * 4 / (medians["copy"] / 1e3), 2 * 2048**3 / (medians["product"] / 1e3)


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
    copied, multiplied = peaks(device)
    medians = interleaved_medians(functions, rounds, device)
    rival, ratio = ratio_to_best_rival(medians)
    elements, seconds = x.numel() + delta.numel(), medians["ours"] / 1e3
    memory = elements * x.element_size() / copied
    arithmetic = 2 * rank * elements * (2 if with_B else 1) / multiplied
    return {
        "name": f"lora_grad r={rank}{', with B' if with_B else ''}", "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."), "device": device,
        "ours_ms": medians["ours"], "baseline": rival, "baseline_ms": medians[rival], "ratio": ratio,
        # Of what bounds it: reading x and delta once at the speed of a copy, or the sums at that of a matrix product.
        "roofline_fraction": max(memory, arithmetic) / seconds if dtype == torch.float32 else memory / seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    backend = backend_of("lora_grad", arguments.device)
    print(f"backend {backend}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("   P, N, d_in, d_out  name                     dtype  ours ms  plain ms  ratio  of roofline  best plain")
    cases = [(shape, rank, torch.float32, False) for shape in SHAPES for rank in RANKS]
    cases += [(shape, 8, torch.float32, True) for shape in SHAPES]
    cases += [(shape, 8, dtype, False) for shape in SHAPES for dtype in (torch.float64, torch.bfloat16)]
    cases += [((1, 197, 768, 768), 8, torch.float32, False)]
    rows = []
    for shape, rank, dtype, with_B in cases:
        row = measure(arguments.device, dtype, shape, rank, with_B, arguments.rounds)
        rows.append(row)
        print(
            f"{', '.join(map(str, shape)):>20}  {row['name']:22} {row['dtype']:>8} {row['ours_ms']:8.3f} "
            f"{row['baseline_ms']:9.3f} {row['ratio']:6.2f} {row['roofline_fraction']:12.2f}  {row['baseline']}",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
