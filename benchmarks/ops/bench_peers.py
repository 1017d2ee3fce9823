"""matching_loss and total_variation against breaching's objectives and regulariser, called from its own package.

    python benchmarks/ops/bench_peers.py [--device cuda] [--json FILE]

Forward and backward to the candidate gradients, as a step of an attack needs them. breaching (Geiping et al., 2020, and
later) knows one trial and no weights; where our definition differs by a factor, the same factor is applied to both.
Without breaching installed there is nothing to compare, and the script says so. (torch.func and Opacus, which make
per-sample gradients, are in ../pairs/bench_pairs.py.)
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, options, row, say, write_json

from r2f_ext.ops import matching_loss, total_variation

MODELS = {  # d_out, d_in of the linear layers
    "embedded": [(384, 128), (128, 128), (256, 128), (128, 256)] * 4,
    "ViT-B": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
}


def compare(
    name: str, variables: list[Tensor], ours: Callable[[], Tensor], theirs: Callable[[], Tensor], traffic: int
) -> dict[str, Any]:
    """Both must give one loss and one gradient."""
    functions = {
        label: lambda loss=loss: torch.autograd.grad(loss().sum(), variables)
        for label, loss in (("ours", ours), ("breaching", theirs))
    }
    torch.testing.assert_close(ours().sum(), theirs().sum(), rtol=1e-4, atol=1e-5)
    for mine, other in zip(*(function() for function in functions.values()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    device, size = variables[0].device.type, sum(v.numel() for v in variables)
    medians = interleaved_medians(functions, 7 if size > 10**7 else 25, device)
    shape = [size] if len(variables) > 1 else list(variables[0].shape)
    return row(name, shape, torch.float32, medians, device, traffic)


def objectives(model: str, device: str) -> list[dict[str, Any]]:
    from breaching.attacks.auxiliaries.objectives import CosineSimilarity, Euclidean

    observed = [torch.randn(shape, device=device) for shape in MODELS[model]]
    candidate = [torch.randn(shape, device=device).requires_grad_() for shape in MODELS[model]]
    observed_trials, size = [o[None] for o in observed], sum(o.numel() for o in observed)
    rows = []
    for kind, factor, peer in (("cosine", 1.0, CosineSimilarity()), ("l2", len(observed) / 2, Euclidean())):

        def ours(kind: str = kind, factor: float = factor) -> Tensor:
            return factor * matching_loss([c[None] for c in candidate], observed_trials, kind=kind)

        def theirs(peer: Any = peer) -> Tensor:
            return peer.gradient_based_loss(candidate, observed)

        rows.append(compare(f"matching_loss {kind}, {model}", candidate, ours, theirs, traffic=4 * 3 * size))
    return rows


def regulariser(shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """breaching's takes in the outer border, against zeros, and adds 1e-8 to each difference: flat borders of zeros."""
    from breaching.attacks.auxiliaries.regularizers import TotalVariation

    images = torch.zeros(shape, device=device)
    images[..., 1:-1, 1:-1] = torch.rand(*shape[:2], shape[2] - 2, shape[3] - 2, device=device)
    images.requires_grad_()
    peer = TotalVariation({"device": torch.device(device), "dtype": torch.float32}, scale=1.0)
    count, (h, w) = shape[0], shape[2:]

    def ours() -> Tensor:  # means over pairs; theirs are over pixels, and one number for all images
        return total_variation(images) * ((h - 1) / h / count)

    assert h == w, "the two means have one factor for square images only"
    return compare("total_variation", [images], ours, lambda: peer(images), 4 * 3 * images.numel())


def main() -> None:
    asked = options(__doc__)
    warnings.filterwarnings("ignore")  # breaching is compiled by torch.jit, which comments on its age
    rows = []
    if importlib.util.find_spec("breaching") is None:
        print("breaching is not installed (pip install breaching==0.1.2): nothing to compare with")
    else:
        for model in MODELS:
            rows += objectives(model, asked.device)
        rows += [regulariser(shape, asked.device) for shape in ((1, 3, 32, 32), (8, 3, 224, 224))]
    for line in rows:
        say(line)
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
