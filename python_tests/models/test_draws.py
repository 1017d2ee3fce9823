"""A against PEFT's own draws, and against draws that were moved, scaled, rounded or made by other generators."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from r2f_ext.models.draws import (
    Trace,
    eva_trace,
    forgot_start,
    gaussian_trace,
    in_uniform_range,
    uniform_bound,
    uniform_trace,
)

WIDTHS = (24, 96, 768)


def drawn(d_in: int, rank: int = 8, seed: int = 0, init: bool | str = True) -> Tensor:
    """A as PEFT draws it for a layer of that width."""
    torch.manual_seed(seed)
    layer = Linear(nn.Linear(d_in, 4), "default", LoraConfig(r=rank, init_lora_weights=init), r=rank, lora_alpha=1)
    return layer.lora_A["default"].weight.detach()


def layers(d_in: int, init: bool | str = True, count: int = 8) -> list[Tensor]:
    return [drawn(d_in, seed=seed, init=init) for seed in range(count)]


@pytest.mark.parametrize("d_in", WIDTHS)
def test_pefts_default_start_is_known_to_the_last_bit(d_in):
    factors = layers(d_in)
    assert uniform_trace(factors) is Trace.NONE
    bound = uniform_bound(d_in)
    assert bound == pytest.approx(d_in**-0.5) and max(float(a.abs().max()) for a in factors) <= bound * (1 + 1e-7)
    for moved in (
        [a * (1 - 1e-5) for a in factors],  # AdamW's decay in one step of rate 1e-3
        [a + 1e-7 * bound * torch.randn_like(a) * (1 - a.abs() / bound) for a in factors],
        [(torch.rand_like(a, dtype=torch.float64) * 2 - 1).mul(bound).float() for a in factors],
    ):
        assert all(in_uniform_range(a) for a in moved)
        assert uniform_trace(moved) is Trace.POSSIBLE


def test_a_start_of_other_draws_or_large_movements_is_no_default_start():
    assert uniform_trace(layers(96, "gaussian")) is Trace.MOVED
    assert uniform_trace([1.001 * a for a in layers(96)]) is Trace.MOVED
    one = layers(96)
    one[3] = one[3] + 0.02 * torch.randn_like(one[3])
    assert uniform_trace(one) is Trace.MOVED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_lifts_no_draw_out_of_the_range(dtype):
    """bfloat16 rounds 0.2 % of the draws at d_in = 768 above 1 / sqrt(768)."""
    above = 0
    for seed in range(20):
        rounded = drawn(768, rank=64, seed=seed).to(dtype).float()
        above += int((rounded.abs() > 768**-0.5).sum())
        assert in_uniform_range(rounded) and uniform_trace([rounded]) is Trace.POSSIBLE
    assert above > 0 or dtype is torch.float16
    step = 1 + 2 * torch.finfo(dtype).eps
    beyond = torch.full((8, 768), 768**-0.5 * step).to(dtype).float()
    assert not in_uniform_range(beyond)


def test_few_numbers_show_nothing():
    assert uniform_trace([drawn(16, rank=1)]) is Trace.POSSIBLE
    assert gaussian_trace([drawn(16, rank=2, init="gaussian")]) is Trace.POSSIBLE
    assert uniform_trace([]) is Trace.POSSIBLE


def test_the_gaussian_start_is_known_by_its_pairs():
    factors = layers(768, "gaussian")
    assert gaussian_trace(factors) is Trace.NONE
    odd = [drawn(129, rank=13, seed=seed, init="gaussian") for seed in range(24)]  # the last 16 are drawn anew
    assert gaussian_trace(odd) is Trace.NONE
    for moved in (
        [a * (1 - 1e-5) for a in factors],
        [a + 1e-5 * torch.randn_like(a) for a in factors],
        [torch.randn(a.shape, dtype=torch.float64).float() / len(a) for a in factors],
        [a.bfloat16().float() for a in factors],
    ):
        assert gaussian_trace(moved) is Trace.POSSIBLE


def test_another_spread_is_no_gaussian_start():
    factors = layers(96, "gaussian")
    far = [a.clone() for a in factors]
    far[0][0, 0] = 2.0
    for moved in ([1.2 * a for a in factors], [a + 0.1 for a in factors], far, layers(96)):
        assert gaussian_trace(moved) is Trace.MOVED


def test_evas_rows_are_orthogonal():
    rows = torch.linalg.qr(torch.randn(96, 8))[0].T
    scale = torch.rand(8, 1) + 0.5  # `whiten` divides by the singular values
    assert eva_trace([rows, scale * rows]) is Trace.POSSIBLE
    assert eva_trace([rows, rows + 0.01 * torch.randn_like(rows)]) is Trace.MOVED
    assert eva_trace([rows[:1]]) is Trace.POSSIBLE


def test_forgot_start_tells_decayed_factors_from_random_ones():
    generator = torch.Generator().manual_seed(0)
    for rank, d_in in ((1, 16), (8, 96), (64, 128), (96, 96)):
        a = torch.rand(rank, d_in, generator=generator) - 0.5
        assert not forgot_start(a)
    decayed = 1e-4 * torch.rand(8, 96, generator=generator) + torch.randn(8, 1, generator=generator)
    assert forgot_start(decayed)
    assert not forgot_start(torch.full((8, 96), float("nan")))
