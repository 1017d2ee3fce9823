"""factored_matching_loss with total variation, forward and backward, against the best plain PyTorch form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from layers import EMBEDDED, EMBEDDED_TOKENS, VIT_B_BLOCK, VIT_B_TOKENS
from measure import Functions
from plain import TV_WEIGHT, variation
from torch import Tensor

from r2f_ext.ops import factored_matching_loss

pytestmark = pytest.mark.benchmark(group="factored_matching_loss")
SIDES = {EMBEDDED_TOKENS: 32, VIT_B_TOKENS: 224}  # of the images with so many tokens


class Case(NamedTuple):
    model: str
    layers: list[tuple[int, int]]  # d_out, d_in
    trials: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.model}-T{self.trials}"


CASES = [
    *(Case("embedded", EMBEDDED, trials, EMBEDDED_TOKENS) for trials in (1, 8)),
    Case("3 blocks of ViT-B", VIT_B_BLOCK * 3, 1, VIT_B_TOKENS),
]


def plain_forms(observed: list[Tensor]) -> dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]]:
    """1 - cos averaged over layers. What depends on the observed gradient alone is prepared before the clock starts."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in observed])

    def average(inner: list[Tensor], square: list[Tensor]) -> Tensor:
        return (1 - torch.stack(inner) / (torch.stack(square).clamp_min(0).sqrt() * norms)).mean(0)

    def square(x: Tensor, d: Tensor) -> Tensor:
        return ((d @ d.mT) * (x @ x.mT)).sum((1, 2))

    def factors(xs: list[Tensor], ds: list[Tensor]) -> Tensor:
        inner = [((d @ o) * x).sum((1, 2)) for x, d, o in zip(xs, ds, observed, strict=True)]
        return average(inner, [square(x, d) for x, d in zip(xs, ds, strict=True)])

    def written_out(xs: list[Tensor], ds: list[Tensor]) -> Tensor:
        gradients = [d.mT @ x for x, d in zip(xs, ds, strict=True)]
        inner = [(g * o).sum((1, 2)) for g, o in zip(gradients, observed, strict=True)]
        return average(inner, [g.square().sum((1, 2)) for g in gradients])

    def half_written_out(xs: list[Tensor], ds: list[Tensor]) -> Tensor:  # the inner product by x G*^T
        inner = [((x @ o.mT) * d).sum((1, 2)) for x, d, o in zip(xs, ds, observed, strict=True)]
        return average(inner, [square(x, d) for x, d in zip(xs, ds, strict=True)])

    return {"factors": factors, "x G*^T": half_written_out, "written out": written_out}


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_factored_matching_loss(versus: Callable[..., None], device: str, case: Case) -> None:
    trials, tokens, side = case.trials, case.tokens, SIDES[case.tokens]

    def make() -> Functions:
        x = [torch.randn(trials, tokens, d_in, device=device).requires_grad_() for _, d_in in case.layers]
        delta = [torch.randn(trials, tokens, d_out, device=device).requires_grad_() for d_out, _ in case.layers]
        observed = [torch.randn(1, d_out, d_in, device=device) for d_out, d_in in case.layers]
        images = torch.rand(trials, 3, side, side, device=device).requires_grad_()

        def both(loss: Callable[[], Tensor]) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss().sum(), [*x, *delta, images])

        def ours() -> Tensor:
            return factored_matching_loss(x, delta, observed, images=images, tv_weight=TV_WEIGHT)

        def plain(form: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Callable[[], object]:
            return both(lambda: form(x, delta) + TV_WEIGHT * variation(images))

        return {"ours": both(ours), **{name: plain(form) for name, form in plain_forms(observed).items()}}

    # Multiply-adds: half of the Gram matrices, forward and backward, their products, and delta G* and x G*^T.
    grams = sum(tokens**2 * (d_out + d_in) for d_out, d_in in case.layers)
    work = 2 * grams + 2 * tokens * sum(a * b for a, b in case.layers)
    versus(
        f"factored_matching_loss + TV, dense observed, {case.model}",
        [trials, tokens, len(case.layers)],
        make,
        flops=2 * trials * work,
        tolerance=1e-2,
    )
