"""matching_loss with total variation, forward and backward, against the best plain PyTorch form.

python benchmarks/ops/bench_matching_loss.py [--device cuda] [--json FILE]
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

from r2f_ext.ops import matching_loss

EMBEDDED = [(384, 128), (128, 128), (256, 128), (128, 256)] * 4  # d_out, d_in of its linear layers
VIT_B = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12  # 85 million numbers
NUMBERS = [(1, 1)] * 16  # nothing to compute: what the call and autograd's graph cost
TV_WEIGHT = 0.05


class Case(NamedTuple):
    model: str
    layers: list[tuple[int, int]]
    trials: int
    image: tuple[int, int, int]
    kind: str


CASES = [
    Case("embedded", EMBEDDED, 1, (3, 32, 32), "layer_cosine"),
    Case("embedded", EMBEDDED, 1, (3, 32, 32), "cosine"),
    Case("embedded", EMBEDDED, 1, (3, 32, 32), "l2"),
    Case("16 numbers", NUMBERS, 1, (1, 2, 2), "l2"),
    Case("embedded", EMBEDDED, 8, (3, 32, 32), "layer_cosine"),
    Case("embedded", EMBEDDED, 8, (3, 32, 32), "l2"),
    Case("ViT-B", VIT_B, 1, (3, 224, 224), "layer_cosine"),
    Case("ViT-B", VIT_B, 1, (3, 224, 224), "cosine"),
]


def variation(images: Tensor) -> Tensor:
    rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3))
    return rows + (images[..., :, 1:] - images[..., :, :-1]).abs().mean((1, 2, 3))


def from_sums(inner: Tensor, candidate: Tensor, observed: Tensor, kind: str) -> Tensor:
    """[L, T] each -> [T]."""
    if kind == "cosine":
        inner, candidate, observed = inner.sum(0), candidate.sum(0), observed.sum(0)
        return 1 - inner / (candidate * observed).sqrt()
    return (1 - inner / (candidate * observed).sqrt()).mean(0)


def plain_forms(observed: list[Tensor], kind: str) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """The same loss in plain PyTorch, each in its own way. What depends on observed alone is not counted."""
    flat = [o.flatten(1) for o in observed]
    squares = torch.stack([o.square().sum(1) for o in flat])
    norms = squares.sqrt()
    columns, long = [o[0, :, None] for o in flat], torch.cat(flat, 1)
    long_norm = norms.square().sum(0).sqrt()

    def sums(candidate: list[Tensor]) -> Tensor:
        rows = [c.flatten(1) for c in candidate]
        if kind == "l2":
            return torch.stack([(c - o).square().sum(1) for c, o in zip(rows, flat, strict=True)]).mean(0)
        inner = torch.stack([(c * o).sum(1) for c, o in zip(rows, flat, strict=True)])
        return from_sums(inner, torch.stack([c.square().sum(1) for c in rows]), squares, kind)

    def products(candidate: list[Tensor]) -> Tensor:  # matrix-vector products and norms
        rows = [c.flatten(1) for c in candidate]
        inner = torch.stack([(c @ o)[:, 0] for c, o in zip(rows, columns, strict=True)])
        square = torch.stack([torch.linalg.vector_norm(c, dim=1) for c in rows]).square()
        return from_sums(inner, square, squares, kind)

    def library(candidate: list[Tensor]) -> Tensor:
        rows = [c.flatten(1) for c in candidate]
        if kind == "l2":
            terms = [(c - o).pow(2).sum(1) for c, o in zip(rows, flat, strict=True)]
        else:
            terms = [1 - torch.cosine_similarity(c, o, dim=1) for c, o in zip(rows, flat, strict=True)]
        return torch.stack(terms).mean(0)

    def joined(candidate: list[Tensor]) -> Tensor:  # one long vector
        c = torch.cat([c.flatten(1) for c in candidate], 1)
        if kind == "l2":
            return (c - long).square().sum(1) / len(candidate)
        return 1 - (c @ long[0]) / (torch.linalg.vector_norm(c, dim=1) * long_norm)

    forms: dict[str, Callable[[list[Tensor]], Tensor]] = {"sums": sums}
    if kind != "l2":
        forms["products"] = products
    if kind != "cosine":
        forms["library"] = library
    if kind != "layer_cosine":
        forms["joined"] = joined
    return forms


def measure(case: Case, device: str) -> dict[str, Any]:
    observed = [torch.randn(1, *shape, device=device) for shape in case.layers]
    candidate = [torch.randn(case.trials, *shape, device=device).requires_grad_() for shape in case.layers]
    images = torch.rand(case.trials, *case.image, device=device).requires_grad_()

    def both(loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(loss().sum(), [*candidate, images])

    functions = {
        "ours": both(lambda: matching_loss(candidate, observed, kind=case.kind, images=images, tv_weight=TV_WEIGHT))
    }
    for form, function in plain_forms(observed, case.kind).items():
        functions[form] = both(lambda function=function: function(candidate) + TV_WEIGHT * variation(images))
    expected = torch.cat([g.flatten() for g in functions["sums"]()])
    for form, function in functions.items():
        found = torch.cat([g.flatten() for g in function()])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=form)
    medians = interleaved_medians(functions, 7 if case.model == "ViT-B" else 45, device)
    # Any method reads both lists at least once, and writes one.
    shared, own = sum(o.numel() for o in observed), sum(c.numel() for c in candidate)
    shape = [case.trials, shared, *case.image]
    name = f"matching_loss {case.kind} + TV, {case.model}"
    return row(name, shape, torch.float32, medians, device, traffic=4 * (2 * own + shared + 2 * images.numel()))


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
