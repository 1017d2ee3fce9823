"""matching_loss with total variation, forward and backward, against the best plain PyTorch form and breaching's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from layers import EMBEDDED, VIT_B_BLOCK
from measure import Functions
from plain import TV_WEIGHT, variation
from torch import Tensor

from r2f_ext.ops import matching_loss

pytestmark = pytest.mark.benchmark(group="matching_loss")
VIT_B = VIT_B_BLOCK * 12  # 85 million numbers
NUMBERS = [(1, 1)] * 16  # nothing to compute: the cost of the call and of autograd's graph


class Case(NamedTuple):
    model: str
    layers: list[tuple[int, int]]  # d_out, d_in
    trials: int
    image: tuple[int, int, int]
    kind: str

    def __str__(self) -> str:
        return f"{self.model}-T{self.trials}-{self.kind}"


CASES = [
    *(Case("embedded", EMBEDDED, trials, (3, 32, 32), kind) for trials in (1, 8) for kind in ("layer_cosine", "l2")),
    *(Case("embedded", EMBEDDED, trials, (3, 32, 32), "cosine") for trials in (1, 8)),
    Case("numbers", NUMBERS, 1, (1, 2, 2), "l2"),
    Case("ViT-B", VIT_B, 1, (3, 224, 224), "layer_cosine"),
]


def from_sums(inner: Tensor, candidate: Tensor, observed: Tensor, kind: str) -> Tensor:
    """[L, T] each -> [T]."""
    if kind == "cosine":
        inner, candidate, observed = inner.sum(0), candidate.sum(0), observed.sum(0)
        return 1 - inner / (candidate * observed).sqrt()
    return (1 - inner / (candidate * observed).sqrt()).mean(0)


def plain_forms(observed: list[Tensor], kind: str) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """The same loss in plain PyTorch. What depends on `observed` alone is prepared before the clock starts."""
    flat = [o.flatten(1) for o in observed]
    squares = torch.stack([o.square().sum(1) for o in flat])
    columns, long = [o[0, :, None] for o in flat], torch.cat(flat, 1)
    long_norm = squares.sum(0).sqrt()

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

    forms: dict[str, Callable[[list[Tensor]], Tensor]] = {}
    if kind != "layer_cosine":
        forms["joined"] = joined
    if kind != "cosine":
        forms["library"] = library
    if kind != "l2":
        forms["products"] = products
    return {**forms, "sums": sums}


def traffic(layers: list[tuple[int, int]], trials: int, pixels: int) -> float:
    """Bytes that any method moves: it reads both lists and the images, and writes gradients of candidate and images."""
    size = sum(d_out * d_in for d_out, d_in in layers)
    return 4.0 * (2 * trials * size + size + 2 * trials * pixels)


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_matching_loss(versus: Callable[..., None], device: str, case: Case) -> None:
    def make() -> Functions:
        observed = [torch.randn(1, *shape, device=device) for shape in case.layers]
        candidate = [torch.randn(case.trials, *shape, device=device).requires_grad_() for shape in case.layers]
        images = torch.rand(case.trials, *case.image, device=device).requires_grad_()

        def both(loss: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss().sum(), [*candidate, images])

        def plain(form: Callable[[list[Tensor]], Tensor]) -> Callable[[], object]:
            return both(lambda: form(candidate) + TV_WEIGHT * variation(images))

        ours = both(lambda: matching_loss(candidate, observed, kind=case.kind, images=images, tv_weight=TV_WEIGHT))
        return {"ours": ours, **{name: plain(form) for name, form in plain_forms(observed, case.kind).items()}}

    versus(
        f"matching_loss {case.kind} + TV, {case.model}",
        [case.trials, sum(d_out * d_in for d_out, d_in in case.layers), *case.image],
        make,
        traffic=traffic(case.layers, case.trials, torch.Size(case.image).numel()),
    )


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def bench_breaching(versus: Callable[..., None], device: str, kind: str) -> None:
    """Against the objective and the regulariser of breaching's own package (Geiping et al., 2020, and later).

    breaching has one trial and no layer weights. Two definitions differ: breaching halves the squared differences and
    sums them over layers, ours averages over layers; its total variation is a mean over pixels, with a border of zeros,
    ours a mean over pairs of neighbours. Constant factors make the two equal, and the images have a border of zeros.
    """
    objectives = pytest.importorskip("breaching.attacks.auxiliaries.objectives")
    regularizers = pytest.importorskip("breaching.attacks.auxiliaries.regularizers")
    side, factor = 32, 1.0 if kind == "cosine" else len(EMBEDDED) / 2
    peer = objectives.CosineSimilarity() if kind == "cosine" else objectives.Euclidean()
    setup: Any = {"device": torch.device(device), "dtype": torch.float32}
    roughness = regularizers.TotalVariation(setup, scale=factor * TV_WEIGHT * side / (side - 1))

    def make() -> Functions:
        observed = [torch.randn(shape, device=device) for shape in EMBEDDED]
        candidate = [torch.randn(shape, device=device).requires_grad_() for shape in EMBEDDED]
        images = torch.zeros(1, 3, side, side, device=device)
        images[..., 1:-1, 1:-1] = torch.rand(1, 3, side - 2, side - 2, device=device)
        images.requires_grad_()
        trials = [o[None] for o in observed]

        def ours() -> Tensor:
            gradients = [c[None] for c in candidate]
            return factor * matching_loss(gradients, trials, kind=kind, images=images, tv_weight=TV_WEIGHT).sum()

        def theirs() -> Tensor:
            return peer.gradient_based_loss(candidate, observed) + roughness(images)

        def both(loss: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(), [*candidate, images])

        return {"ours": both(ours), "breaching": both(theirs)}

    size = sum(d_out * d_in for d_out, d_in in EMBEDDED)
    name = f"matching_loss {kind} + TV, against breaching"
    versus(name, [1, size, 3, side, side], make, traffic=traffic(EMBEDDED, 1, 3 * side**2))
