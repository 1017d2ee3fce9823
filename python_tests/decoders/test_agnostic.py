"""One decoder for every A."""

import pytest
import torch
from cases import LINEAR, cosine, proxy_set, target_of, tiny_base

from r2f_ext.decoders import (
    ANY_A,
    ANY_A_KINDS,
    KINDS,
    AgnosticPairs,
    ConcatenatedPairs,
    ProductPairs,
    Ridge,
    fit_decoders,
    load_core,
    load_decoder,
    save_decoders,
    shared_core,
)
from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.decoders.core import Core
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, SimulatedPairs, StoredPairs, Training, random_a, write_pairs

FIT, ALL = 120, 160


@pytest.fixture(scope="module")
def view(pairs):
    many = GeneratedPairs(pairs.target, pairs.a, pairs.proxy, per_victim_a=3)
    return AgnosticPairs(many, Core.of(many, FIT, 48))


def test_the_view_is_the_core_of_the_projected_gradient(view, pairs):
    (batch,) = view.batches(5, 9)
    a = random_a(pairs.target, 3, 5, 4)
    for layer in pairs.target.layers:
        name, found = layer.name, batch.updates[layer.name].double()
        rows, _ = torch.linalg.qr(a[name].mT.double())
        projected = layer.scale * batch.gradients.dense(name).double() @ rows @ rows.mT
        expected = view.core.left[name].double().mT @ projected @ view.core.right[name].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        assert torch.equal(view.updates(5, 9)[name], batch.updates[name])


def test_a_decoder_fitted_over_many_a_beats_the_projection_on_an_unseen_one(view, pairs):
    decoder = Ridge()
    decoder.fit(view, FIT)
    (batch,) = pairs.batches(FIT, ALL)  # of the adapter's own A, which the view never used
    decoded = decoder.decode(view.view(batch.updates, pairs.a)).dense
    for name, gradient in decoded.items():
        true, a = batch.gradients.dense(name), pairs.a[name]
        floor = cosine(true @ torch.linalg.pinv(a) @ a, true).mean()
        assert cosine(gradient, true).mean() > floor + 0.1


def test_pairs_of_many_steps_or_of_one_a_are_refused(view, pairs):
    trained = SimulatedPairs(pairs.target, pairs.a, pairs.proxy, Training(steps=2), per_victim_a=1)
    with pytest.raises(R2FError, match="their gradients depend on A"):
        AgnosticPairs(trained, view.core)
    with pytest.raises(R2FError, match="all share one A: generate them with r2f pairs --per-victim-a"):
        next(AgnosticPairs(pairs, view.core).batches())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    base, folder = tiny_base(torch.float32), tmp_path_factory.mktemp("own")
    target = target_of(base, LINEAR)
    a = {layer.name: torch.randn(layer.rank, layer.d_in) / 5 for layer in target.layers}
    write_pairs(GeneratedPairs(target, a, proxy_set(40, base), per_victim_a=2), 40, folder, lambda units: None)
    return StoredPairs(folder, base)


def test_layers_fitted_apart_make_the_decoders_fitted_together_and_come_back(stored, tmp_path):
    core = shared_core(stored, 30, Checkpoint(tmp_path, "whole"))
    whole = fit_decoders(AgnosticPairs(stored, core), 30, ANY_A_KINDS)
    merged = {kind: {} for kind in (ANY_A, *ANY_A_KINDS)}
    for name in LINEAR:
        merged[ANY_A] |= Core.of(stored.only((name,)), 30, 48).state()
        for part in fit_decoders(AgnosticPairs(stored.only((name,)), core), 30, ANY_A_KINDS):
            merged[part.kind] |= part.state()
    expected = {ANY_A: core.state(), **{decoder.kind: decoder.state() for decoder in whole}}
    for kind, state in expected.items():
        assert state.keys() == merged[kind].keys()
        assert all(torch.equal(merged[kind][key], tensor) for key, tensor in state.items())

    save_decoders(tmp_path, expected, stored, 30)
    seen = AgnosticPairs(stored, load_core(tmp_path, stored))
    updates = seen.updates(30, 40)
    for decoder in whole:
        assert isinstance(decoder, KINDS[decoder.kind])
        found = load_decoder(tmp_path, decoder.kind, stored, seen).decode(updates).dense
        for name, gradient in decoder.decode(updates).dense.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_the_shared_core_is_taken_over(stored, tmp_path, monkeypatch):
    first = shared_core(stored, 30, Checkpoint(tmp_path, "x")).state()
    monkeypatch.setattr(Core, "of", lambda *args: pytest.fail("made again"))
    again = shared_core(stored, 30, Checkpoint(tmp_path, "x")).state()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_product_and_the_factors_are_two_other_forms_of_the_same_pairs(view, pairs):
    product, factors = ProductPairs(view.pairs, view.core), ConcatenatedPairs(view.pairs, view.core)
    (batch,), a = view.pairs.batches(5, 9), random_a(pairs.target, 3, 5, 4)
    for layer in pairs.target.layers:
        name, update = layer.name, batch.updates[layer.name]
        ba = view.core.left[name].mT @ (update @ a[name]) @ view.core.right[name]
        torch.testing.assert_close(product.updates(5, 9)[name], ba, rtol=1e-3, atol=1e-4 * float(ba.abs().max()))
        own, other = factors.updates(5, 9)[name].split((layer.d_out, layer.d_in), dim=1)
        assert torch.equal(own, update)
        assert cosine(other, a[name].mT).min() > 1 - 1e-5
        torch.testing.assert_close(other.flatten(1).norm(dim=1), own.flatten(1).norm(dim=1))


def test_decoders_of_every_form_are_homogeneous(view, pairs):
    (batch,) = pairs.batches(FIT, FIT + 3)
    for form in (ProductPairs, ConcatenatedPairs):
        source, decoder = form(view.pairs, view.core), Ridge()
        decoder.fit(source, 60)
        once, twice = (
            decoder.decode(source.view({n: c * u for n, u in batch.updates.items()}, pairs.a)).dense for c in (1, 2)
        )
        for name, gradient in once.items():
            torch.testing.assert_close(twice[name], 2 * gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
