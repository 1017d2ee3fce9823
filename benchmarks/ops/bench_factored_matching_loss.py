"""factored_matching_loss, forward and backward, against the best plain PyTorch form.

python benchmarks/ops/bench_factored_matching_loss.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, options, row, say, write_json

from r2f_ext.ops import factored_matching_loss

EMBEDDED = [(384, 128), (128, 128), (256, 128), (128, 256)] * 4  # d_out, d_in
VIT_B = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 3


class Case(NamedTuple):
    model: str
    layers: list[tuple[int, int]]
    trials: int
    tokens: int
    factored: bool  # the observed gradient


CASES = [
    Case("embedded", EMBEDDED, 1, 65, False),
    Case("embedded", EMBEDDED, 8, 65, False),
    Case("embedded", EMBEDDED, 8, 65, True),
    Case("3 blocks of ViT-B", VIT_B, 1, 197, False),
    Case("3 blocks of ViT-B", VIT_B, 1, 197, True),
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


def measure(case: Case, device: str) -> dict[str, Any]:
    trials, tokens = case.trials, case.tokens
    x = [torch.randn(trials, tokens, d_in, device=device).requires_grad_() for _, d_in in case.layers]
    delta = [torch.randn(trials, tokens, d_out, device=device).requires_grad_() for d_out, _ in case.layers]
    star = [torch.randn(1, tokens, d_out, device=device) for d_out, _ in case.layers] if case.factored else []
    observed = [
        torch.randn(1, *((tokens, d_in) if case.factored else (d_out, d_in)), device=device)
        for d_out, d_in in case.layers
    ]

    def both(loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss().sum(), [*x, *delta])

    functions = {"ours": both(lambda: factored_matching_loss(x, delta, observed, star or None))}
    for form, function in plain_forms(observed, star).items():
        functions[form] = both(lambda function=function: function(x, delta))
    expected = torch.cat([g.flatten() for g in functions["factors"]()])
    for form, function in functions.items():
        found = torch.cat([g.flatten() for g in function()])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=form)
    # Multiply-adds that ours needs: of Gram matrices half, forward and backward, and their products; dense: 3 products.
    grams = sum(tokens**2 * (d_out + d_in) for d_out, d_in in case.layers)
    work = 2 * grams + (4 * grams if case.factored else 2 * tokens * sum(a * b for a, b in case.layers))
    name = f"factored_matching_loss, {'factored' if case.factored else 'dense'} observed, {case.model}"
    medians = interleaved_medians(functions, 5 if case.model != "embedded" else 15, device)
    shape = [trials, tokens, len(case.layers)]
    return row(name, shape, torch.float32, medians, device, flops=2 * trials * work)


def main() -> None:
    asked = options(__doc__)
    rows = []
    for case in CASES:
        rows.append(measure(case, asked.device))
        say(rows[-1])
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
