"""Pairs read back, and reprojected for another adapter."""

import json
import os

import pytest
import torch
from cases import LINEAR, cosine, target_of
from safetensors.torch import load_file, save_file

from r2f_ext.errors import R2FError
from r2f_ext.files import sha256
from r2f_ext.pairs import (
    GeneratedPairs,
    ReprojectedPairs,
    SimulatedPairs,
    StoredPairs,
    Training,
    plan_pairs,
    write_pairs,
)
from r2f_ext.types import Target


def silent(units):
    pass


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (3, 25), (9, 11), (12, 18), (24, 99), (5, 5)])
def test_slices_across_shards(written, made, start, stop):
    stored = StoredPairs(written, made.target.base)
    whole = stored.updates(0, 25)[LINEAR[0]]
    parts = [batch.updates[LINEAR[0]] for batch in stored.batches(start, stop)]
    assert torch.equal(torch.cat(parts) if parts else whole[:0], whole[start:stop])


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


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("layers"),
        lambda m: m.pop("shards"),
        lambda m: m["layers"][0].pop("rank"),
        lambda m: m.update(layers=5),
        lambda m: m.update(training={"epochs": 3}),
        lambda m: m.update(shards={}),
        lambda m: m["shards"].append(None),
        lambda m: m["shards"][0].update(name="../stored/pairs-00000.safetensors"),
        lambda m: m["shards"][0].update(count="ten"),
        lambda m: m["shards"][0].pop("sha256"),
    ],
)
def test_damaged_manifest(copied, made, change):
    edit(copied, change)
    with pytest.raises(R2FError, match="damaged"):
        StoredPairs(copied, made.target.base)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000, "\xff\xfe"])
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


def test_a_shard_that_is_not_finite(copied, made):
    """As an earlier version wrote it, with a manifest that fits."""
    path = copied / "pairs-00001.safetensors"
    tensors = load_file(path)
    tensors[f"update/{LINEAR[0]}"][2, 0, 0] = float("nan")
    save_file(tensors, path)
    edit(copied, lambda m: m["shards"][1].update(sha256=sha256(path)))
    with pytest.raises(R2FError, match=rf"holds NaN or infinity in update/{LINEAR[0]}.*smaller --lr"):
        StoredPairs(copied, made.target.base).updates(0, 25)


def test_damaged_start(copied, made):
    path = copied / "start.safetensors"
    a = load_file(path)
    save_file({LINEAR[0]: a[LINEAR[0]][:2].contiguous(), LINEAR[1]: a[LINEAR[1]]}, path)
    with pytest.raises(R2FError, match=f"does not hold A of {LINEAR[0]}"):
        StoredPairs(copied, made.target.base)
    path.unlink()
    with pytest.raises(R2FError, match=r"start\.safetensors' is missing"):
        StoredPairs(copied, made.target.base)


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


def test_some_layers_are_read_alone_with_the_updates_of_all(made, written, tmp_path, monkeypatch):
    stored = StoredPairs(written, made.target.base)
    some = stored.only(LINEAR[1:])
    assert some.target.names == LINEAR[1:] and stored.target.names == LINEAR
    for batch, whole in zip(some.batches(), stored.batches(), strict=True):
        assert list(batch.gradients.x) == list(LINEAR[1:]) and list(batch.updates) == list(LINEAR)
        assert torch.equal(batch.gradients.x[LINEAR[1]], whole.gradients.x[LINEAR[1]])


def test_a_second_adapter_shares_the_files_of_the_first(made, written, tmp_path):
    base = made.target.base
    other = {name: torch.randn_like(a) for name, a in made.a.items()}
    pairs = ReprojectedPairs(StoredPairs(written, base), made.target, other)
    plan = plan_pairs(pairs, 15, tmp_path)
    plan.write(silent)
    name = "factors-00001.safetensors"
    assert os.path.samefile(tmp_path / name, written / name)
    read = StoredPairs(tmp_path, base)
    assert len(read) == 15
    (expected,) = GeneratedPairs(made.target, other, made.proxy).batches(0, 15)
    assert cosine(read.updates(0, 15)[LINEAR[0]], expected.updates[LINEAR[0]]).min() > 0.9999
    true = torch.cat([batch.gradients.dense(LINEAR[0]) for batch in read.batches()])
    assert cosine(true, expected.gradients.dense(LINEAR[0])).min() > 0.9999
    own = [p.stat().st_size for p in tmp_path.glob("pairs-*.safetensors")]
    assert sum(own) * 0.7 < plan.size < sum(own)  # gradients cost nothing


def test_pairs_of_other_weights_serve_no_adapter(made, written):
    stored, weight = StoredPairs(written, made.target.base), made.target.base.model.head.weight
    before = weight.clone()
    with torch.no_grad():
        weight.add_(1)
    try:
        with pytest.raises(R2FError, match="made with other weights of 'tiny'"):
            ReprojectedPairs(stored, made.target, made.a)
    finally:
        with torch.no_grad():
            weight.copy_(before)  # adding and subtracting would leave rounding behind


def test_victims_with_their_own_a_come_back_with_it(made, tmp_path):
    base = made.target.base
    for pairs, folder in (
        (GeneratedPairs(made.target, made.a, made.proxy, per_victim_a=3), tmp_path / "one"),
        (SimulatedPairs(made.target, made.a, made.proxy, Training(steps=2), per_victim_a=3), tmp_path / "two"),
    ):
        write_pairs(pairs, 6, folder, silent)
        (found,), (expected,) = StoredPairs(folder, base).batches(), pairs.batches(0, 6)
        for name in LINEAR:
            assert torch.equal(found.a0[name], expected.a0[name]) and found.a0[name][0].ne(found.a0[name][1]).any()
            assert (found.a is None) == (expected.a is None)
            if found.a is not None:
                assert torch.equal(found.a[name], expected.a[name]) and not torch.equal(found.a[name], found.a0[name])


def test_dense_gradients_and_a_trained_start_come_back(made, tmp_path):
    base = made.target.base
    b = {layer.name: torch.randn(layer.d_out, layer.rank) / 50 for layer in made.target.layers}
    pairs = SimulatedPairs(made.target, made.a, made.proxy, Training(steps=2), b=b, dense=True)
    write_pairs(pairs, 6, tmp_path, silent, dense=True)
    assert sorted(load_file(tmp_path / "factors-00000.safetensors")) == [f"gradient/{name}" for name in LINEAR]
    stored = StoredPairs(tmp_path, base)
    (found,), (expected,) = stored.batches(), pairs.batches(0, 6)
    for name in LINEAR:
        assert torch.equal(stored.b[name], b[name])
        assert cosine(found.gradients.dense(name), expected.gradients.dense(name)).min() > 0.9999
        assert torch.equal(found.gradients.dense(name), found.gradients.x[name])


def test_sources_say_what_they_are(made, written, tmp_path):
    base, b = made.target.base, {layer.name: torch.ones(layer.d_out, layer.rank) for layer in made.target.layers}
    cases = [
        (made, True, False, 1),
        (GeneratedPairs(made.target, made.a, made.proxy, group_size=2, per_victim_a=0), True, True, 2),
        (SimulatedPairs(made.target, made.a, made.proxy, Training()), True, False, 1),
        (SimulatedPairs(made.target, made.a, made.proxy, Training(steps=2, batch=2)), False, False, 2),
        (SimulatedPairs(made.target, made.a, made.proxy, Training(), b=b, per_victim_a=0), False, True, 1),
        (ReprojectedPairs(StoredPairs(written, base), made.target, made.a, per_victim_a=0), True, True, 1),
    ]
    for case, (pairs, *expected) in enumerate(cases):
        write_pairs(pairs, 4, tmp_path / str(case), silent)
        for each in (pairs, StoredPairs(tmp_path / str(case), base)):
            assert [each.one_step, each.per_victim_a, each.group_size] == expected
