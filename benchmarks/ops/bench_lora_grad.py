"""lora_grad of all layers in one call, against the best plain PyTorch form, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from layers import EMBEDDED, EMBEDDED_TOKENS, VIT_B_BLOCK, VIT_B_TOKENS
from measure import Functions
from torch import Tensor
from torch.nn.functional import linear

from r2f_ext.ops import lora_grad

pytestmark = pytest.mark.benchmark(group="lora_grad")
VIT_B_LAYER = [(768, 768)]
RANKS = (1, 4, 8, 16, 32)


class Case(NamedTuple):
    model: str
    layers: list[tuple[int, int]]  # d_out, d_in
    groups: int
    tokens: int
    rank: int
    dtype: torch.dtype = torch.float32
    with_B: bool = False
    per_group_A: bool = False

    @property
    def more(self) -> str:
        return f"{', with B' if self.with_B else ''}{', per-group A' if self.per_group_A else ''}"

    def __str__(self) -> str:
        text = f"{self.model}-P{self.groups}-r{self.rank}{self.more}-{self.dtype}"
        return text.replace("torch.", "").replace(", ", "-").replace(" ", "_")


def embedded(groups: int, rank: int, dtype: torch.dtype = torch.float32, **more: bool) -> Case:
    return Case("embedded", EMBEDDED, groups, EMBEDDED_TOKENS, rank, dtype, **more)


def vit_b(groups: int, rank: int, dtype: torch.dtype = torch.float32, **more: bool) -> Case:
    return Case("ViT-B layer", VIT_B_LAYER, groups, VIT_B_TOKENS, rank, dtype, **more)


def whole_vit_b(rank: int, dtype: torch.dtype = torch.float32) -> Case:
    return Case("ViT-B", VIT_B_BLOCK * 12, 32, VIT_B_TOKENS, rank, dtype)


CASES = [
    *(embedded(100, rank) for rank in RANKS),
    *(embedded(100, rank, torch.bfloat16) for rank in RANKS),
    embedded(100, 8, torch.float64),
    embedded(100, 8, with_B=True),
    embedded(100, 8, per_group_A=True),
    embedded(1, 8),
    *(vit_b(32, rank) for rank in RANKS),
    vit_b(8, 8),
    vit_b(32, 8, torch.bfloat16),
    vit_b(32, 8, with_B=True),
    vit_b(1, 8),
    whole_vit_b(8),
    *(whole_vit_b(rank, torch.bfloat16) for rank in (8, 16, 32)),
]


def plain_forms(
    x: list[Tensor], delta: list[Tensor], A: list[Tensor], B: list[Tensor] | None
) -> dict[str, Callable[[], object]]:
    """The same results in plain PyTorch. All forms but "DᵀU" return grad_B as a transposed view.

    In bfloat16 only the form "bmm in float32" keeps the precision of ours; the others round products to bfloat16.
    """
    if A[0].ndim == 2:  # made before the clock starts
        columns, shared = [a.mT.contiguous() for a in A], [a.mT.expand(len(x[0]), *a.mT.shape) for a in A]
    else:
        columns, shared = [a.mT.contiguous() for a in A], [a.mT for a in A]

    def every_layer(grad_B: Callable[[int], Tensor]) -> Callable[[], object]:
        def run() -> list[Tensor]:
            results = [grad_B(layer) for layer in range(len(x))]
            if B is not None:
                results += [(d @ b).mT @ x_l for x_l, d, b in zip(x, delta, B, strict=True)]
            return results

        return run

    forms = {
        "bmm": every_layer(lambda i: torch.bmm(torch.bmm(x[i], shared[i]).mT, delta[i]).mT),
        "((Axᵀ)D)ᵀ": every_layer(lambda i: ((A[i] @ x[i].mT) @ delta[i]).mT),
        "(UᵀD)ᵀ": every_layer(lambda i: ((x[i] @ columns[i]).mT @ delta[i]).mT),
        "DᵀU": every_layer(lambda i: delta[i].mT @ (x[i] @ columns[i])),
    }
    if x[0].dtype == torch.bfloat16:
        forms["bmm in float32"] = every_layer(
            lambda i: torch.bmm(torch.bmm(x[i].float(), shared[i].float()).mT, delta[i].float()).mT
        )
    if A[0].ndim == 2:
        forms["(UᵀD)ᵀ, linear"] = every_layer(lambda i: (linear(x[i], A[i]).mT @ delta[i]).mT)
    return forms


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_lora_grad(versus: Callable[..., None], device: str, case: Case) -> None:
    if case.model == "ViT-B" and case.dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("a row for GPUs: without bfloat16 products it takes minutes")
    P, N, r = case.groups, case.tokens, case.rank
    like = {"device": device, "dtype": case.dtype}

    def make() -> Functions:
        x = [torch.randn(P, N, d_in, **like) for _, d_in in case.layers]
        delta = [torch.randn(P, N, d_out, **like) for d_out, _ in case.layers]
        A = [torch.randn(*([P] if case.per_group_A else []), r, d_in, **like) for _, d_in in case.layers]
        B = [torch.randn(d_out, r, **like) for d_out, _ in case.layers] if case.with_B else None
        scales = [1.0] * len(x)

        def ours() -> list[Tensor]:
            found = lora_grad(x, delta, A, B, scales=scales)
            return [*found.grad_B, *(found.grad_A if case.with_B else [])]

        return {"ours": ours, **plain_forms(x, delta, A, B)}

    elements = P * N * sum(d_out + d_in for d_out, d_in in case.layers)  # read once; r products each, with B 2 r
    versus(
        f"lora_grad {case.model} r={r}{case.more}",
        [P, N, len(case.layers)],
        make,
        dtype=case.dtype,
        traffic=elements * case.dtype.itemsize,
        flops=2 * r * elements * (2 if case.with_B else 1),
        tolerance=2e-2 if case.dtype == torch.bfloat16 else 1e-4,
    )
