"""Spectra are those of s B A, as an SVD of the whole product gives them."""

from types import SimpleNamespace

import pytest
import torch

from r2f_ext.audit.spectra import spectra_of
from r2f_ext.types import AdaptedLayer, LoraUpdate


def target(**scales):
    layers = tuple(AdaptedLayer(name, 12, 9, 4, scale) for name, scale in scales.items())
    return SimpleNamespace(layers=layers)


def update(name="l", seed=0, b=1.0):
    generator = torch.Generator().manual_seed(seed)
    return LoraUpdate(
        {name: torch.randn(4, 9, generator=generator)}, {name: b * torch.randn(12, 4, generator=generator)}
    )


def test_singular_values_of_one_adapter_are_those_of_its_product():
    one = update()
    expected = torch.linalg.svdvals(2.5 * one.b["l"].double() @ one.a["l"].double())[:4]
    found = spectra_of(target(l=2.5), [one])["l"]
    assert found.largest == pytest.approx(float(expected[0]))
    assert found.relative == pytest.approx((expected / expected[0]).tolist())
    energy = expected.square().cumsum(0) / expected.square().sum()
    assert found.directions == int((energy < 0.99).sum()) + 1


def test_several_adapters_give_medians_each_over_its_own_largest():
    adapters = [update(seed=seed, b=10.0**seed) for seed in range(3)]
    alone = [spectra_of(target(l=1.0), [one])["l"] for one in adapters]
    found = spectra_of(target(l=1.0), adapters)["l"]
    assert found.largest == sorted(one.largest for one in alone)[1]
    assert found.relative[1] == sorted(one.relative[1] for one in alone)[1]


def test_one_direction_and_none():
    one = update()
    one.b["l"][:, 1:] = 0
    assert spectra_of(target(l=1.0), [one])["l"].directions == 1
    empty = spectra_of(target(l=1.0), [update(b=0.0)])["l"]
    assert (empty.largest, empty.relative, empty.directions) == (0.0, [0.0] * 4, 0)
