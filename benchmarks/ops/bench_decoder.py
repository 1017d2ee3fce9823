"""decode and decoder_cosine_loss against the best plain PyTorch forms, on the embedded model's layers.

python benchmarks/ops/bench_decoder.py [--device cuda [--cold-l2]] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, options, row, say, write_json

from r2f_ext.ops import decode, decoder_cosine_loss

RAGGED = [(384, 128), (128, 128), (256, 128), (128, 256)] * 4  # d_out, d_in
STACKED = [(256, 128)] * 16
RANK, HIDDEN, BASIS, TOKENS = 8, 256, 256, 65
BATCHES = (1, 2, 4, 8, 64)


def weights_of(
    shapes: list[tuple[int, int]], device: str
) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
    """One hidden map, the coefficients, a basis: weights and biases [map][layer]."""

    def maps(width: int, columns: list[int]) -> list[Tensor]:
        return [torch.randn(width, n, device=device) / n**0.5 for n in columns]

    weights = [maps(HIDDEN, [d_out * RANK for d_out, _ in shapes]), maps(BASIS, [HIDDEN] * len(shapes))]
    biases = [[torch.randn(len(w), device=device) for w in each] for each in weights]
    bases = [torch.randn(BASIS, d_out * d_in, device=device) / BASIS**0.5 for d_out, d_in in shapes]
    return weights, biases, bases


def loop(
    z: list[Tensor], weights: list[list[Tensor]], biases: list[list[Tensor]], bases: list[Tensor] | None
) -> list[Tensor]:
    """Layer by layer."""
    results = []
    for layer, h in enumerate(z):
        for j, (w, b) in enumerate(zip(weights, biases, strict=True)):
            h = F.linear(h if j == 0 else F.gelu(h), w[layer], b[layer])
        results.append(h if bases is None else h @ bases[layer])
    return results


def stacked(forms: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """All layers at once: bmm or baddbmm, of weights that are transposed before the clock starts."""
    w1, w2, b1, b2, basis = forms

    def run(z: Tensor) -> Tensor:
        h = torch.baddbmm(b2, F.gelu(torch.baddbmm(b1, z, w1)), w2)
        return h if basis is None else torch.bmm(h, basis)

    return run


def bench_decode(name: str, shapes: list[tuple[int, int]], batch: int, with_basis: bool, device: str) -> dict:
    weights, biases, bases = weights_of(shapes, device)
    head = bases if with_basis else None
    z = [torch.randn(batch, d_out * RANK, device=device) for d_out, _ in shapes]
    functions = {
        "ours": lambda: decode(z, weights, biases, head),
        "loop of F.linear": lambda: loop(z, weights, biases, head),
    }
    if len(set(shapes)) == 1:
        z_all = torch.stack(z)
        z = list(z_all)
        W = [torch.stack(each) for each in weights]
        bias = [torch.stack(each)[:, None] for each in biases]
        basis = torch.stack(bases) if with_basis else None
        weights, biases = [list(w) for w in W], [list(b[:, 0]) for b in bias]  # views: one copy of all
        head = bases = None if basis is None else list(basis)
        views = stacked([W[0].mT, W[1].mT, *bias, basis])
        copies = stacked([W[0].mT.contiguous(), W[1].mT.contiguous(), *bias, basis])
        functions |= {"stacked bmm": lambda: copies(z_all), "stacked bmm, views": lambda: views(z_all)}
    with torch.no_grad():
        for form, function in functions.items():
            for got, want in zip(function(), functions["loop of F.linear"](), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, msg=form)
        medians = interleaved_medians(functions, 15 if device == "cpu" else 31, device)
    read = sum(t.numel() for each in (*weights, *biases) for t in each) + sum(t.numel() for t in head or [])
    return row(
        f"decode {name}{', basis' if with_basis else ''}",
        [batch, len(shapes)],
        torch.float32,
        medians,
        device,
        traffic=4.0 * read,
        flops=2.0 * batch * read,
    )


def bench_training(shapes: list[tuple[int, int]], batch: int, device: str) -> dict:
    """1 - cos, forward and backward to the coefficients and bases."""
    c = [torch.randn(batch, BASIS, device=device).requires_grad_() for _ in shapes]
    bases = [(torch.randn(BASIS, d_out * d_in, device=device) / BASIS**0.5).requires_grad_() for d_out, d_in in shapes]
    x = [torch.randn(batch, TOKENS, d_in, device=device) for _, d_in in shapes]
    delta = [torch.randn(batch, TOKENS, d_out, device=device) for d_out, _ in shapes]

    def written_out() -> Tensor:
        total = torch.zeros((), device=device)
        for each, basis, x_l, d in zip(c, bases, x, delta, strict=True):
            total = total + (1 - F.cosine_similarity(each @ basis, (d.mT @ x_l).flatten(1), dim=1)).sum()
        return total

    def half() -> Tensor:  # G is never formed: <G_hat, G> = sum_n delta_n^T G_hat x_n, |G|^2 by Gram matrices
        total = torch.zeros((), device=device)
        for each, basis, x_l, d in zip(c, bases, x, delta, strict=True):
            decoded = (each @ basis).view(batch, d.shape[2], x_l.shape[2])
            inner = ((d @ decoded) * x_l).sum((1, 2))
            square = ((d @ d.mT) * (x_l @ x_l.mT)).sum((1, 2))
            total = total + (1 - inner / (decoded.flatten(1).norm(dim=1) * square.sqrt())).sum()
        return total

    def both(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), [*c, *bases])

    functions = {
        "ours": both(lambda: decoder_cosine_loss(c, bases, x, delta)[0].sum()),
        "written out": both(written_out),
        "G by factors": both(half),
    }
    expected = functions["written out"]()
    for form, function in functions.items():
        for got, want in zip(function(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()), msg=form)
    medians = interleaved_medians(functions, 7 if device == "cpu" else 31, device)
    products = sum(
        d_out * d_in * (4 * BASIS + 2 * TOKENS) for d_out, d_in in shapes
    )  # two forward, two backward, twice G
    return row(
        "decoder_cosine_loss, both ways",
        [batch, len(shapes)],
        torch.float32,
        medians,
        device,
        flops=2.0 * batch * products,
    )


def main() -> None:
    asked = options(__doc__)
    rows = []
    for name, shapes in (("stacked", STACKED), ("ragged", RAGGED)):
        for with_basis in (True, False):
            for batch in BATCHES:
                rows.append(bench_decode(name, shapes, batch, with_basis, asked.device))
                say(rows[-1])
    for batch in (8, 64):
        rows.append(bench_training(RAGGED[:4], batch, asked.device))
        say(rows[-1])
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
