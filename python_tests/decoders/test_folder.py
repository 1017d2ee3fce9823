"""Decoders of pairs on disk, from Python as `r2f fit` and `r2f decode` use them."""

import dataclasses

import pytest
import torch
from cases import LINEAR, proxy_set, target_of, tiny_base

from r2f_ext.decoders import decode_from_folder, fit_decoders, fit_folder, held_out_cosines
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, StoredPairs, write_pairs
from r2f_ext.progress import Stages
from r2f_ext.types import LoraUpdate


def written(folder, count, per_victim_a=None):
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    generator = torch.Generator().manual_seed(0)
    a = {layer.name: torch.randn(layer.rank, layer.d_in, generator=generator) / 5 for layer in target.layers}
    pairs = GeneratedPairs(target, a, proxy_set(count, base), per_victim_a=per_victim_a)
    write_pairs(pairs, count, folder, lambda units: None)
    return StoredPairs(folder, base), a


def adapter_of(pairs, a, row):
    """The adapter that a pair's update is of, at learning rate 1."""
    updates = pairs.updates(row, row + 1)
    b = {layer.name: -updates[layer.name][0] for layer in pairs.target.layers}
    return LoraUpdate(a, b)


def test_the_figures_are_those_of_a_fit_to_the_first_pairs(tmp_path):
    pairs, _ = written(tmp_path / "pairs", 30)
    stages = Stages()
    found = fit_folder(pairs, tmp_path / "decoders", ["ridge", "projection"], stages)
    assert (found.fitted, found.held_out) == (24, 6) and set(stages.seconds) == {"fit", "held-out"}
    for decoder in fit_decoders(pairs, 24, ["ridge", "projection"]):
        expected = held_out_cosines(decoder.decode(pairs.updates(24, 30)), pairs, 24, 30).summary()
        assert list(found.decoders[decoder.kind]) == list(pairs.target.names)
        for name, figures in expected.items():
            assert dataclasses.asdict(found.decoders[decoder.kind][name]) == pytest.approx(
                dataclasses.asdict(figures), abs=1e-5
            )


def test_an_adapter_is_decoded_as_by_the_decoder_itself(tmp_path):
    pairs, a = written(tmp_path / "pairs", 30)
    fit_folder(pairs, tmp_path / "decoders", ["ridge"])
    (ridge,) = fit_decoders(pairs, 24, ["ridge"])
    adapter = adapter_of(pairs, a, 27)
    expected = ridge.decode(pairs.updates(27, 28)).dense
    found = decode_from_folder(tmp_path / "decoders", "ridge", pairs, pairs.target, [adapter]).dense
    for name, gradient in expected.items():
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.9999


def test_pairs_with_an_a_each_serve_any_a(tmp_path):
    pairs, _ = written(tmp_path / "pairs", 40, per_victim_a=3)
    found = fit_folder(pairs, tmp_path / "decoders")
    assert list(found.decoders) == ["ridge"] and (tmp_path / "decoders" / "any_a.safetensors").exists()
    (batch,) = pairs.batches(36, 37)
    own = {name: each[0] for name, each in batch.a0.items()}
    decoded = decode_from_folder(tmp_path / "decoders", "ridge", pairs, pairs.target, [adapter_of(pairs, own, 36)])
    assert all(each.shape == (1, *batch.gradients.dense(name).shape[1:]) for name, each in decoded.dense.items())
    other = dataclasses.replace(pairs.target, layers=pairs.target.layers[:1])
    with pytest.raises(R2FError, match="of other layers, rank or alpha"):
        decode_from_folder(tmp_path / "decoders", "ridge", pairs, other, [adapter_of(pairs, own, 36)])


def test_kinds_for_one_a_are_refused_for_pairs_with_an_a_each(tmp_path):
    pairs, _ = written(tmp_path / "pairs", 30, per_victim_a=3)
    with pytest.raises(R2FError, match="row_lmmse decodes one A only: choose ridge, kernel_ridge, mlp"):
        fit_folder(pairs, tmp_path / "decoders", ["row_lmmse"])


def test_too_few_pairs_are_refused(tmp_path):
    pairs, _ = written(tmp_path / "pairs", 19)
    with pytest.raises(R2FError, match="holds 19 pairs: at least 20 are needed"):
        fit_folder(pairs, tmp_path / "decoders")
