"""Decoders and gradients on disk."""

import json
import shutil

import pytest
import torch
from cases import LINEAR, proxy_set, target_of, tiny_base
from safetensors.torch import save_file

from r2f_ext.decoders import KINDS, fit_decoders, load_decoder, save_decoders, store
from r2f_ext.decoders.store import read_gradients
from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs, StoredPairs, write_pairs


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two sets of 30 pairs on disk, of one start and different proxies."""
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    a = {layer.name: torch.randn(layer.rank, layer.d_in) / 5 for layer in target.layers}
    found = []
    for count in (30, 31):
        folder = tmp_path_factory.mktemp("pairs")
        write_pairs(GeneratedPairs(target, a, proxy_set(count, base)), 30, folder, lambda units: None)
        found.append(StoredPairs(folder, base))
    return found


@pytest.fixture(scope="module")
def fitted(stored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    decoders = fit_decoders(stored[0], 25, list(KINDS))
    save_decoders(folder, {decoder.kind: decoder.state() for decoder in decoders}, stored[0], 25)
    return folder, {decoder.kind: decoder for decoder in decoders}


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_that_comes_back_decodes_the_same(kind, stored, fitted):
    folder, decoders = fitted
    updates = stored[0].updates(25, 30)
    expected = decoders[kind].decode(updates).dense
    found = load_decoder(folder, kind, stored[0]).decode(updates).dense
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_decoders_of_other_pairs_are_refused(stored, fitted):
    with pytest.raises(R2FError, match="fitted to other pairs"):
        load_decoder(fitted[0], "ridge", stored[1])


@pytest.mark.parametrize("damage", ["record", "missing", "swapped", "truncated", "json", "kind"])
def test_damaged_decoders(damage, stored, fitted, tmp_path):
    folder = shutil.copytree(fitted[0], tmp_path / "copy")
    path = folder / "ridge.safetensors"
    if damage == "record":
        (folder / "decoders.json").unlink()
    elif damage == "missing":
        path.unlink()
    elif damage == "swapped":
        shutil.copy(folder / "projection.safetensors", path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "json":
        (folder / "decoders.json").write_text("[]")
    else:
        record = json.loads((folder / "decoders.json").read_text())
        del record["sha256"]["ridge"]
        (folder / "decoders.json").write_text(json.dumps(record))
    with pytest.raises(R2FError, match="no usable ridge decoder"):
        load_decoder(folder, "ridge", stored[0])


def test_decoders_of_another_schema_are_refused(stored, fitted, tmp_path):
    folder = shutil.copytree(fitted[0], tmp_path / "copy")
    record = json.loads((folder / "decoders.json").read_text())
    (folder / "decoders.json").write_text(json.dumps({**record, "schema": 0}))
    with pytest.raises(R2FError, match="have schema 0, this version reads 1: fit again"):
        load_decoder(folder, "ridge", stored[0])


def test_an_interrupted_save_leaves_no_old_record(stored, fitted, tmp_path, monkeypatch):
    folder = shutil.copytree(fitted[0], tmp_path / "copy")
    monkeypatch.setattr(store, "write_tensors", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_decoders(folder, {kind: decoder.state() for kind, decoder in fitted[1].items()}, stored[0], 25)
    with pytest.raises(R2FError, match="no usable"):
        load_decoder(folder, "projection", stored[0])


def test_gradients_come_back_and_bad_ones_are_named(stored, tmp_path):
    target, path = stored[0].target, tmp_path / "g.safetensors"
    good = {layer.name: torch.randn(2, layer.d_out, layer.d_in) for layer in target.layers}
    save_file(good, path)
    assert all(torch.equal(read_gradients(path, target, 2).dense[name], g) for name, g in good.items())
    first, second = LINEAR
    nan = good[second].clone()
    nan[1, 2, 3] = float("nan")
    for tensors, words in (
        ({first: good[first]}, f"{second} is missing"),
        ({**good, first: good[first][..., :-1].contiguous()}, f"{first} is \\(2, 72, 23\\)"),
        ({**good, first: good[first][0].clone()}, f"{first} is \\(72, 24\\)"),
        ({**good, second: nan}, f"{second} holds NaN"),
    ):
        save_file(tensors, path)
        with pytest.raises(R2FError, match=words):
            read_gradients(path, target, 2)
    save_file(good, path)
    with pytest.raises(R2FError, match="expected \\(1, 72, 24\\)"):
        read_gradients(path, target, 1)
    path.write_bytes(b"not safetensors")
    with pytest.raises(R2FError, match="missing or not a safetensors file"):
        read_gradients(path, target, 1)
