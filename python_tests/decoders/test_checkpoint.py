"""Completed decoders are saved, and a later fit resumes from them."""

import json

import pytest
import torch
from cases import LINEAR, proxy_set, target_of, tiny_base

from r2f_ext.decoders import KINDS, MLP, fit_decoders
from r2f_ext.decoders.checkpoint import Checkpoint
from r2f_ext.decoders.learned import PATIENCE
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, StoredPairs, write_pairs

STATE = {
    "a.b": torch.randn(3, 4),
    "numbers": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "rows": torch.arange(5),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs():
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    a = {layer.name: torch.randn(layer.rank, layer.d_in) / 5 for layer in target.layers}
    return GeneratedPairs(target, a, proxy_set(40, base))


def test_what_was_saved_is_loaded(tmp_path):
    checkpoint = Checkpoint(tmp_path, "these pairs")
    assert not checkpoint.holds("ridge")
    checkpoint.save("ridge", STATE)
    assert checkpoint.holds("ridge") and not checkpoint.holds("projection")
    found = checkpoint.load("ridge", CPU)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in STATE.items())
    assert not list((tmp_path / "unfinished").rglob("*.metadata"))  # torch pickles that file: safetensors need none
    checkpoint.save("ridge", {"other": torch.ones(1)})
    assert list(checkpoint.load("ridge", CPU)) == ["other"]
    checkpoint.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["other pairs", "nonsense", "unfinished"])
def test_what_is_not_whole_or_of_other_pairs_is_not_taken_over(damage, tmp_path):
    Checkpoint(tmp_path, "these pairs").save("ridge", STATE)
    record = tmp_path / "unfinished" / "ridge.json"
    if damage == "nonsense":
        record.write_text("[]")
    elif damage == "unfinished":
        record.unlink()
    assert not Checkpoint(tmp_path, "others" if damage == "other pairs" else "these pairs").holds("ridge")


def test_a_fit_goes_on_from_the_kinds_that_are_finished(pairs, tmp_path, monkeypatch):
    kinds, last = [*(kind for kind in KINDS if kind != "mlp"), "mlp"], "mlp"
    expected = {decoder.kind: decoder for decoder in fit_decoders(pairs, 30, kinds)}

    def killed(decoder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KINDS[last], "finish", killed)
        fit_decoders(pairs, 30, kinds, checkpoint=Checkpoint(tmp_path, "x"))
    kept = [path.stem for path in (tmp_path / "unfinished").glob("*.json")]
    assert sorted(kept) == sorted(set(kinds) - {last})
    for kind in kept:
        monkeypatch.setattr(KINDS[kind], "start", lambda *args: pytest.fail("fitted again"))
    for decoder in fit_decoders(pairs, 30, kinds, checkpoint=Checkpoint(tmp_path, "x")):
        for name, tensor in expected[decoder.kind].state().items():
            assert torch.equal(decoder.state()[name], tensor)


@pytest.fixture
def stored(pairs, tmp_path):
    write_pairs(pairs, 40, tmp_path, lambda units: None)
    return StoredPairs(tmp_path, pairs.target.base)


def test_layers_fitted_apart_make_the_decoders_fitted_together(stored):
    whole = {decoder.kind: decoder for decoder in fit_decoders(stored, 30, list(KINDS))}
    updates = stored.updates(30, 40)
    merged = {kind: {} for kind in list(KINDS)}
    for name in LINEAR:
        for part in fit_decoders(stored.only((name,)), 30, list(KINDS)):
            merged[part.kind] |= part.state()
            decoded = part.decode(updates).dense
            assert list(decoded) == [name]
            torch.testing.assert_close(
                decoded[name], whole[part.kind].decode(updates).dense[name], rtol=1e-5, atol=1e-9
            )
            for key, tensor in part.state().items():
                assert torch.equal(whole[part.kind].state()[key], tensor)
    for none in fit_decoders(stored.only(()), 30, list(KINDS)):  # a process more than there are layers
        assert not none.decode(updates).dense
    assert all(merged[kind].keys() == decoder.state().keys() for kind, decoder in whole.items())


def test_a_layer_stops_where_it_stops_alone(stored, monkeypatch):
    """The first layer does not improve and stops early; the second continues to train."""
    real = MLP.network

    def network(decoder, name, shape):
        found = real(decoder, name, shape)
        for parameter in found.parameters() if name == LINEAR[0] else ():
            parameter.register_hook(torch.zeros_like)
        return found

    monkeypatch.setattr(MLP, "network", network)

    def learned(names):
        figures = []
        (decoder,) = fit_decoders(stored.only(names), 30, ["mlp"], log=lambda *figure: figures.append(figure))
        return decoder.state(), figures

    (state, figures), *alone = (learned(names) for names in (LINEAR, *((name,) for name in LINEAR)))
    epochs = [len(part) // 2 for _, part in alone]
    assert epochs[0] == 1 + PATIENCE < epochs[1]
    assert sorted(figures) == sorted(figure for _, part in alone for figure in part)
    assert all(torch.equal(state[key], tensor) for part, _ in alone for key, tensor in part.items())


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(R2FError, match="No space left on device"):
        Checkpoint(tmp_path, "x").save("ridge", STATE)
    assert not Checkpoint(tmp_path, "x").holds("ridge")


def test_a_record_is_plain(tmp_path):
    Checkpoint(tmp_path, "these pairs").save("ridge", STATE)
    assert json.loads((tmp_path / "unfinished" / "ridge.json").read_text()) == {"fitted_to": "these pairs"}
