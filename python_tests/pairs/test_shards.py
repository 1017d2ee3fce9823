"""Pairs on disk: the same as in memory, and whole or not there."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from cases import LINEAR, cosine, proxy_set, target_of, tiny_base
from safetensors.torch import load_file, save_file

from r2f_ext import files
from r2f_ext.errors import R2FError
from r2f_ext.pairs import (
    GeneratedPairs,
    ReprojectedPairs,
    SimulatedPairs,
    StoredPairs,
    Training,
    generate,
    write_pairs,
)
from r2f_ext.types import Target

Usage = namedtuple("Usage", "total used free")


def silent(units):
    pass


@pytest.fixture(scope="module")
def made():
    base = tiny_base(torch.float32)
    target = target_of(base, LINEAR)
    a = {layer.name: torch.randn(layer.rank, layer.d_in) / 5 for layer in target.layers}
    return GeneratedPairs(target, a, proxy_set(25, base))


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    """25 pairs, 10 in a shard."""
    folder = tmp_path_factory.mktemp("pairs") / "stored"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "BATCH_GROUPS", 10)
        write_pairs(made, 25, folder, silent)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_made_is_what_is_read(made, written):
    stored = StoredPairs(written, made.target.base)
    assert len(stored) == 25 and stored.target.layers == made.target.layers
    (whole,) = made.batches()
    images, labels = stored.samples()
    assert torch.equal(labels, whole.labels[:, 0])
    torch.testing.assert_close(images, whole.images[:, 0], rtol=0, atol=1e-7)
    updates = stored.updates(0, 25)
    for name in LINEAR:
        assert torch.equal(stored.a[name], made.a[name])
        torch.testing.assert_close(updates[name], whole.updates[name], rtol=1e-4, atol=1e-7)
        dense = torch.cat([batch.gradients.dense(name) for batch in stored.batches()])
        assert cosine(dense, whole.gradients.dense(name)).min() > 0.9999


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 25), (9, 11), (12, 18), (24, 99), (5, 5)])
def test_slices_across_shards(written, made, start, stop):
    stored = StoredPairs(written, made.target.base)
    whole = stored.updates(0, 25)[LINEAR[0]]
    parts = [batch.updates[LINEAR[0]] for batch in stored.batches(start, stop)]
    assert torch.equal(torch.cat(parts) if parts else whole[:0], whole[start:stop])


def test_fewer_than_there_are(made, tmp_path):
    write_pairs(made, 7, tmp_path, silent)
    assert len(StoredPairs(tmp_path, made.target.base)) == 7


class Killed(BaseException):
    """As sudden as a signal: nothing may catch it."""


def cut_off(pairs, count, folder, after):
    """A run that dies once `after` pairs are written."""
    done = 0

    def advance(units):
        nonlocal done
        done += units
        if done >= after:
            raise Killed

    with pytest.raises(Killed):
        write_pairs(pairs, count, folder, advance)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(made, written, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    cut_off(made, 25, tmp_path, after=20)
    assert sorted(contents(tmp_path)) == ["pairs-00000.safetensors", "pairs-00001.safetensors", "unfinished.json"]
    before = (tmp_path / "pairs-00000.safetensors").stat().st_mtime_ns
    steps = []
    write_pairs(made, 25, tmp_path, steps.append)
    assert steps == [20, 5] and (tmp_path / "pairs-00000.safetensors").stat().st_mtime_ns == before
    assert contents(tmp_path) == contents(written)


@pytest.mark.parametrize("what", ["another count", "another A", "another proxy", "a changed shard", "nonsense"])
def test_what_another_run_left_is_not_taken_over(what, made, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    cut_off(made, 25, tmp_path, after=10)
    pairs, count = made, 25
    if what == "another count":
        count = 20
    elif what == "another A":
        pairs = GeneratedPairs(made.target, {name: 2 * a for name, a in made.a.items()}, made.proxy)
    elif what == "another proxy":
        pairs = GeneratedPairs(made.target, made.a, proxy_set(26, made.target.base))
    elif what == "a changed shard":
        with open(tmp_path / "pairs-00000.safetensors", "ab") as file:
            file.write(b"x")
    else:
        (tmp_path / "unfinished.json").write_text("[]")
    steps = []
    write_pairs(pairs, count, tmp_path, steps.append)
    assert steps[0] == 0
    assert len(StoredPairs(tmp_path, made.target.base)) == count and not (tmp_path / "unfinished.json").exists()


def test_stored_factors_serve_another_adapter(made, written):
    other = {name: torch.randn_like(a) for name, a in made.a.items()}
    one_layer = Target(made.target.base, made.target.layers[1:])
    name = one_layer.names[0]
    reprojected = ReprojectedPairs(StoredPairs(written, made.target.base), one_layer, {name: other[name]})
    assert len(reprojected) == 25
    (expected,) = GeneratedPairs(made.target, other, made.proxy).batches()
    updates = torch.cat([batch.updates[name] for batch in reprojected.batches()])
    assert cosine(updates, expected.updates[name]).min() > 0.9999
    assert [list(batch.gradients.x) for batch in reprojected.batches(0, 5)] == [[name]]


def test_what_cannot_serve_another_adapter_is_refused(made, written, tmp_path):
    base = made.target.base
    with pytest.raises(R2FError, match=r"do not hold blocks\.0\.mlp\.fc1"):
        ReprojectedPairs(StoredPairs(written, base), target_of(base, ("blocks.0.mlp.fc1",)), {})
    write_pairs(SimulatedPairs(made.target, made.a, made.proxy, Training(steps=2)), 4, tmp_path, silent)
    with pytest.raises(R2FError, match="trained for steps"):
        ReprojectedPairs(StoredPairs(tmp_path, base), made.target, made.a)


def test_an_interrupted_run_leaves_no_manifest_not_even_the_old_one(made, copied):
    def stop(units):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(made, 25, copied, stop)
    assert not (copied / "manifest.json").exists() and not list(copied.glob(".*"))
    with pytest.raises(R2FError, match="no finished pairs"):
        StoredPairs(copied, made.target.base)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("layers"),
        lambda m: m.pop("shards"),
        lambda m: m["layers"][0].pop("rank"),
        lambda m: m.update(layers=5),
        lambda m: m["shards"][0].update(name="../stored/pairs-00000.safetensors"),
        lambda m: m["shards"][0].update(count="ten"),
        lambda m: m["shards"][0].pop("sha256"),
    ],
)
def test_damaged_manifest(copied, made, change):
    edit(copied, change)
    with pytest.raises(R2FError, match="damaged"):
        StoredPairs(copied, made.target.base)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\xff\xfe"])
def test_manifest_that_is_no_record(copied, made, text):
    (copied / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(R2FError, match="damaged"):
        StoredPairs(copied, made.target.base)


def test_another_schema(copied, made):
    edit(copied, lambda m: m.update(schema=99))
    with pytest.raises(R2FError, match="schema 99"):
        StoredPairs(copied, made.target.base)


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated", "replaced"])
def test_damaged_shard(copied, made, damage):
    path = copied / "pairs-00001.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-100])
    else:
        save_file({"other": torch.zeros(3)}, path)
    stored = StoredPairs(copied, made.target.base)
    assert len(stored.updates(0, 10)[LINEAR[0]]) == 10
    with pytest.raises(R2FError, match=r"pairs-00001\.safetensors' is missing or damaged"):
        stored.updates(0, 25)


def test_damaged_start(copied, made):
    path = copied / "start.safetensors"
    a = load_file(path)
    save_file({LINEAR[0]: a[LINEAR[0]][:2].contiguous(), LINEAR[1]: a[LINEAR[1]]}, path)
    with pytest.raises(R2FError, match=f"does not hold A of {LINEAR[0]}"):
        StoredPairs(copied, made.target.base)
    path.unlink()
    with pytest.raises(R2FError, match=r"start\.safetensors' is missing"):
        StoredPairs(copied, made.target.base)


def test_space_is_asked_for_before_the_first_shard(made, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: Usage(0, 0, 10_000))
    with pytest.raises(R2FError, match="ask for fewer pairs"):
        write_pairs(made, 25, tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


def test_groups_have_no_single_samples(made, tmp_path):
    grouped = GeneratedPairs(made.target, made.a, made.proxy, group_size=2)
    write_pairs(grouped, 12, tmp_path, silent)
    stored = StoredPairs(tmp_path, made.target.base)
    assert len(stored) == 12
    with pytest.raises(R2FError, match="one sample each"):
        stored.samples()


def test_the_fingerprint_tells_pairs_apart(made, written, tmp_path):
    base = made.target.base
    write_pairs(made, 24, tmp_path / "fewer", silent)
    prints = {StoredPairs(folder, base).fingerprint for folder in (written, tmp_path / "fewer")}
    assert len(prints) == 2
    assert StoredPairs(written, base).fingerprint in prints
