"""add_weighted_gradients_ of all layers in one call: sums of w_p delta_p^T x_p over pairs, as in ridge decoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import EMBEDDED, EMBEDDED_TOKENS
from measure import Functions
from torch import Tensor

from r2f_ext.ops import add_weighted_gradients_

pytestmark = pytest.mark.benchmark(group="add_weighted_gradients_")
PAIRS, N = 100, EMBEDDED_TOKENS


def plain_forms(
    weights: list[Tensor], x: list[Tensor], delta: list[Tensor]
) -> dict[str, Callable[[list[Tensor]], list[Tensor]]]:
    """The same sums in plain PyTorch, added to the given totals."""
    layers = list(zip(weights, x, delta, strict=True))

    def by_victim(totals: list[Tensor]) -> list[Tensor]:
        for total, (w, x_l, d) in zip(totals, layers, strict=True):
            rows = x_l.flatten(0, 1)
            for victim, own in enumerate(w):
                total[victim].addmm_((own[:, None, None] * d).flatten(0, 1).mT, rows)
        return totals

    def joined(totals: list[Tensor]) -> list[Tensor]:  # one product for all victims
        for total, (w, x_l, d) in zip(totals, layers, strict=True):
            weighted = (w[:, :, None, None] * d).flatten(1, 2)
            total += (weighted.mT.flatten(0, 1) @ x_l.flatten(0, 1)).view_as(total)
        return totals

    def dense(totals: list[Tensor]) -> list[Tensor]:  # every pair's gradient written out
        for total, (w, x_l, d) in zip(totals, layers, strict=True):
            total.flatten(1).addmm_(w, (d.mT @ x_l).flatten(1))
        return totals

    return {"joined": joined, "dense": dense, "by victim": by_victim}


@pytest.mark.parametrize("victims", [1, 8])
def bench_add_weighted_gradients(versus: Callable[..., None], device: str, victims: int) -> None:
    def make() -> Functions:
        x = [torch.randn(PAIRS, N, d_in, device=device) for _, d_in in EMBEDDED]
        delta = [torch.randn(PAIRS, N, d_out, device=device) for d_out, _ in EMBEDDED]
        weights = [torch.randn(victims, PAIRS, device=device) for _ in EMBEDDED]

        def totals() -> list[Tensor]:
            return [torch.zeros(victims, d_out, d_in, device=device) for d_out, d_in in EMBEDDED]

        mine = totals()

        def ours() -> list[Tensor]:
            add_weighted_gradients_(mine, weights, x, delta)
            return mine

        def on_own(form: Callable[[list[Tensor]], list[Tensor]], own: list[Tensor]) -> Callable[[], object]:
            return lambda: form(own)

        forms = plain_forms(weights, x, delta).items()
        return {"ours": ours, **{name: on_own(form, totals()) for name, form in forms}}

    read = PAIRS * N * sum(d_out + d_in for d_out, d_in in EMBEDDED)
    weights = sum(d_out * d_in for d_out, d_in in EMBEDDED)  # of one gradient
    # By factors, or by dense gradients that all victims share.
    flops = min(2.0 * PAIRS * N * victims * weights, 2.0 * PAIRS * (N + victims) * weights)
    versus(
        "add_weighted_gradients_ embedded",
        [victims, PAIRS, N, len(EMBEDDED)],
        make,
        traffic=4.0 * (read + 2 * victims * weights),
        flops=flops,
    )
