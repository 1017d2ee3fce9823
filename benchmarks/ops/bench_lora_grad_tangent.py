"""lora_grad_tangent of all layers in one call: derivatives of grad_B along K directions, as Gauss-Newton needs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import EMBEDDED, EMBEDDED_TOKENS, VIT_B_TOKENS
from measure import Functions
from torch import Tensor

from r2f_ext.ops import lora_grad_tangent

pytestmark = pytest.mark.benchmark(group="lora_grad_tangent")
MODELS = {"embedded": (EMBEDDED, EMBEDDED_TOKENS), "ViT-B layer": ([(768, 768)], VIT_B_TOKENS)}
CASES = [  # model, directions K, groups P, rank
    *(("embedded", 64, 1, rank) for rank in (1, 4, 8, 16, 32)),
    ("embedded", 8, 16, 8),
    ("ViT-B layer", 16, 1, 8),
]


def plain_forms(
    x: list[Tensor], delta: list[Tensor], dx: list[Tensor], ddelta: list[Tensor], A: list[Tensor]
) -> dict[str, Callable[[], list[Tensor]]]:
    """d(delta^T x A^T) = ddelta^T (x A^T) + delta^T (dx A^T) in plain PyTorch."""
    columns = [a.mT.contiguous() for a in A]
    layers = list(zip(x, delta, dx, ddelta, columns, strict=True))

    def two_products() -> list[Tensor]:
        return [dd.mT @ (x_l @ a) + d.mT @ (dx_l @ a) for x_l, d, dx_l, dd, a in layers]

    def transposed() -> list[Tensor]:
        return [((x_l @ a).mT @ dd + (dx_l @ a).mT @ d).mT for x_l, d, dx_l, dd, a in layers]

    def baddbmm() -> list[Tensor]:
        results = []
        for x_l, d, dx_l, dd, a in layers:
            K, P, N, d_out = dd.shape
            u = (x_l @ a).expand(K, P, N, -1).flatten(0, 1)
            du = (dx_l @ a).flatten(0, 1)
            first = torch.bmm(dd.flatten(0, 1).mT, u)
            both = torch.baddbmm(first, d.expand(K, P, N, d_out).reshape(K * P, N, d_out).mT, du)
            results.append(both.unflatten(0, (K, P)))
        return results

    return {"baddbmm": baddbmm, "transposed": transposed, "two products": two_products}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-K{case[1]}-P{case[2]}-r{case[3]}")
def bench_lora_grad_tangent(versus: Callable[..., None], device: str, case: tuple[str, int, int, int]) -> None:
    model, K, P, r = case
    layers, N = MODELS[model]

    def make() -> Functions:
        x = [torch.randn(P, N, d_in, device=device) for _, d_in in layers]
        delta = [torch.randn(P, N, d_out, device=device) for d_out, _ in layers]
        dx = [torch.randn(K, P, N, d_in, device=device) for _, d_in in layers]
        ddelta = [torch.randn(K, P, N, d_out, device=device) for d_out, _ in layers]
        A = [torch.randn(r, d_in, device=device) for _, d_in in layers]
        scales = [1.0] * len(layers)
        functions = {"ours": lambda: lora_grad_tangent(x, delta, dx, ddelta, A, scales=scales)}
        return functions | plain_forms(x, delta, dx, ddelta, A)

    elements = (K + 1) * P * N * sum(d_out + d_in for d_out, d_in in layers)
    versus(
        f"lora_grad_tangent {model} r={r}",
        [K, P, N, len(layers)],
        make,
        traffic=4 * elements,
        flops=2 * r * K * P * N * sum(2 * d_out + d_in for d_out, d_in in layers),
        tolerance=1e-4,
    )
