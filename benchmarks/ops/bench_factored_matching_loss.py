"""factored_matching_loss, forward and backward, against the best plain PyTorch form.

python benchmarks/ops/bench_factored_matching_loss.py [--device cuda] [--json FILE]
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

from r2f_ext.ops import backend_of, factored_matching_loss

EMBEDDED = [(384, 128), (128, 128), (256, 128), (128, 256)] * 4  # d_out, d_in
VIT_B = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 3
CASES = [  # name, layers, trials, tokens, observed as factors
    ("embedded", EMBEDDED, 1, 65, False),
    ("embedded", EMBEDDED, 8, 65, False),
    ("embedded", EMBEDDED, 8, 65, True),
    ("3 blocks of ViT-B", VIT_B, 1, 197, False),
    ("3 blocks of ViT-B", VIT_B, 1, 197, True),
]


def plain_forms(
    observed: list[Tensor], star: list[Tensor]
) -> dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]]:
    """1 - cos averaged over layers, each in its own way. What depends on observed alone is not counted."""
    dense = [d.mT @ o for o, d in zip(observed, star, strict=True)] if star else observed
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in dense])
    stars = star or [None] * len(observed)

    def average(inner: list[Tensor], square: list[Tensor]) -> Tensor:
        return (1 - torch.stack(inner) / (torch.stack(square).clamp_min(0).sqrt() * norms)).mean(0)

    def gram(x: Tensor, d: Tensor, y: Tensor, e: Tensor) -> Tensor:
        return ((d @ e.mT) * (x @ y.mT)).sum((1, 2))

    def factors(xs: list[Tensor], ds: list[Tensor]) -> Tensor:
        layers = list(zip(xs, ds, observed, stars, strict=True))
        inner = [((d @ o) * x).sum((1, 2)) if e is None else gram(x, d, o, e) for x, d, o, e in layers]
        return average(inner, [gram(x, d, x, d) for x, d, _, _ in layers])

    def written_out(xs: list[Tensor], ds: list[Tensor]) -> Tensor:
        gradients = [d.mT @ x for x, d in zip(xs, ds, strict=True)]
        inner = [(g * o).sum((1, 2)) for g, o in zip(gradients, dense, strict=True)]
        return average(inner, [g.square().sum((1, 2)) for g in gradients])

    def half_written_out(xs: list[Tensor], ds: list[Tensor]) -> Tensor:  # the inner product by x G*^T
        inner = [((x @ o.mT) * d).sum((1, 2)) for x, d, o in zip(xs, ds, dense, strict=True)]
        return average(inner, [gram(x, d, x, d) for x, d in zip(xs, ds, strict=True)])

    return {"factors": factors, "written out": written_out, "x G*^T": half_written_out}


def measure(case: tuple, device: str, rounds: int, flops: float) -> dict:
    name, shapes, trials, tokens, factored = case
    x = [torch.randn(trials, tokens, d_in, device=device).requires_grad_() for _, d_in in shapes]
    delta = [torch.randn(trials, tokens, d_out, device=device).requires_grad_() for d_out, _ in shapes]
    observed = [
        torch.randn(1, tokens, s[1], device=device) if factored else torch.randn(1, *s, device=device) for s in shapes
    ]
    star = [torch.randn(1, tokens, d_out, device=device) for d_out, _ in shapes] if factored else []

    def both(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss().sum(), [*x, *delta])

    functions = {"ours": both(lambda: factored_matching_loss(x, delta, observed, star or None))}
    for form, function in plain_forms(observed, star).items():
        functions[form] = both(lambda function=function: function(x, delta))
    expected = torch.cat([g.flatten() for g in functions["factors"]()])
    for form, function in functions.items():
        torch.testing.assert_close(
            torch.cat([g.flatten() for g in function()]), expected, rtol=1e-3, atol=1e-4, msg=form
        )
    medians = interleaved_medians(functions, rounds, device)
    rival, ratio = ratio_to_best_rival(medians)
    # Multiply-adds that ours needs: of Gram matrices half, forward and backward, and their products; dense: 3 products.
    grams = sum(tokens**2 * (d_out + d_in) for d_out, d_in in shapes)
    work = 2 * grams + (4 * grams if factored else 2 * tokens * sum(a * b for a, b in shapes))
    return {
        "name": f"factored_matching_loss, {'factored' if factored else 'dense'} observed, forward and backward",
        "shape": [name, trials, tokens, len(shapes)], "dtype": "float32", "device": device,
        "ours_ms": medians["ours"], "baseline": rival, "baseline_ms": medians[rival], "ratio": ratio,
        "roofline_fraction": 2 * trials * work / (medians["ours"] / 1e3) / flops,
    }  # fmt: skip


def gemm_flops(device: str) -> float:
    """Operations a second of a large matrix product."""
    a, b = torch.randn(1536, 1536, device=device), torch.randn(1536, 1536, device=device)
    medians = interleaved_medians({"gemm": lambda: a @ b}, 7, device)
    return 2 * 1536**3 / (medians["gemm"] / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    flops = gemm_flops(arguments.device)
    backend = backend_of("factored_matching_loss", arguments.device)
    print(
        f"backend {backend}, {torch.get_num_threads()} threads, torch {torch.__version__}, GEMM {flops / 1e9:.0f} GFLOP/s"
    )
    print("            model   T  observed  ours ms  plain ms  ratio  of GEMM  best plain")
    rows = []
    for case in CASES:
        row = measure(case, arguments.device, arguments.rounds, flops)
        rows.append(row)
        print(
            f"{case[0]:>17} {case[2]:3} {'factored' if case[4] else 'dense':>9} {row['ours_ms']:8.3f} "
            f"{row['baseline_ms']:9.3f} {row['ratio']:6.2f} {row['roofline_fraction']:8.2f}  {row['baseline']}",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
