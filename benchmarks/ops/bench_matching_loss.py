"""matching_loss with total variation, forward and backward, against the best plain PyTorch form.

python benchmarks/ops/bench_matching_loss.py [--device cuda] [--json FILE]
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

from r2f_ext.ops import backend_of, matching_loss

EMBEDDED = [(384, 128), (128, 128), (256, 128), (128, 256)] * 4
VIT_B = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
CASES = [  # name, layers, trials, images, kind
    ("embedded", EMBEDDED, 1, (3, 32, 32), "layer_cosine"),
    ("embedded", EMBEDDED, 8, (3, 32, 32), "layer_cosine"),
    ("embedded", EMBEDDED, 8, (3, 32, 32), "l2"),
    ("ViT-B", VIT_B, 1, (3, 224, 224), "layer_cosine"),
    ("ViT-B", VIT_B, 1, (3, 224, 224), "cosine"),
]
TV_WEIGHT = 0.05


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
    columns = [o[0, :, None] for o in flat]

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
        c, o = torch.cat([c.flatten(1) for c in candidate], 1), torch.cat(flat, 1)
        if kind == "l2":
            return (c - o).square().sum(1) / len(candidate)
        return 1 - (c @ o[0]) / (torch.linalg.vector_norm(c, dim=1) * norms.square().sum(0).sqrt())

    forms: dict[str, Callable[[list[Tensor]], Tensor]] = {"sums": sums}
    if kind != "l2":
        forms["products"] = products
    if kind != "cosine":
        forms["library"] = library
    if kind != "layer_cosine":
        forms["joined"] = joined
    return forms


def measure(case: tuple, device: str, rounds: int, bandwidth: float) -> dict:
    name, shapes, trials, image, kind = case
    observed = [torch.randn(1, *shape, device=device) for shape in shapes]
    candidate = [torch.randn(trials, *shape, device=device).requires_grad_() for shape in shapes]
    images = torch.rand(trials, *image, device=device).requires_grad_()

    def both(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss().sum(), [*candidate, images])

    functions = {
        "ours": both(lambda: matching_loss(candidate, observed, kind=kind, images=images, tv_weight=TV_WEIGHT))
    }
    for form, function in plain_forms(observed, kind).items():
        functions[form] = both(lambda function=function: function(candidate) + TV_WEIGHT * variation(images))
    expected = torch.cat([g.flatten() for g in functions["sums"]()])
    for form, function in functions.items():
        torch.testing.assert_close(
            torch.cat([g.flatten() for g in function()]), expected, rtol=1e-3, atol=1e-4, msg=form
        )
    medians = interleaved_medians(functions, rounds, device)
    rival, ratio = ratio_to_best_rival(medians)
    elements = sum(c.numel() for c in candidate)
    traffic = 4 * (2 * elements + 3 * elements)  # forward reads c, o; backward reads c, o and writes the gradient
    return {
        "name": f"matching_loss {kind} + TV, forward and backward", "shape": [name, trials, elements], "dtype": "float32",
        "device": device, "ours_ms": medians["ours"], "baseline": rival, "baseline_ms": medians[rival], "ratio": ratio,
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
    backend = backend_of("matching_loss", arguments.device)
    print(
        f"backend {backend}, {torch.get_num_threads()} threads, torch {torch.__version__}, copy {bandwidth / 1e9:.1f} GB/s"
    )
    print("model       T          kind  ours ms  plain ms  ratio  of copy  best plain")
    rows = []
    for case in CASES:
        large = case[0] == "ViT-B"
        row = measure(case, arguments.device, 7 if large else arguments.rounds * 5, bandwidth)
        rows.append(row)
        print(
            f"{case[0]:>8} {case[2]:4} {case[4]:>13} {row['ours_ms']:8.3f} {row['baseline_ms']:9.3f} "
            f"{row['ratio']:6.2f} {row['roofline_fraction']:8.2f}  {row['baseline']}",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
