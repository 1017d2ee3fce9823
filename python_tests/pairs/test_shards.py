"""Pairs written to disk: the same as in memory, whole or not there, and made on after any end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from cases import LINEAR, cosine, proxy_set

import r2f_ext
from r2f_ext import files
from r2f_ext.data import load_images
from r2f_ext.errors import R2FError
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs, StoredPairs, generate, plan_pairs, shards, write_pairs
from r2f_ext.pairs.manifest import read_manifest
from r2f_ext.types import AdaptedLayer, Target

REPOSITORY = Path(r2f_ext.__file__).parent.parent
Usage = namedtuple("Usage", "total used free")


def silent(units):
    pass


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
    files = [f"{part}-0000{i}.safetensors" for part in ("factors", "pairs") for i in range(2)]
    assert sorted(contents(tmp_path)) == sorted([*files, "pairs-00000.json", "pairs-00001.json"])
    before = (tmp_path / "pairs-00000.safetensors").stat().st_mtime_ns
    steps = []
    write_pairs(made, 25, tmp_path, steps.append)
    assert steps == [5] and (tmp_path / "pairs-00000.safetensors").stat().st_mtime_ns == before
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
        with open(tmp_path / "factors-00000.safetensors", "ab") as file:
            file.write(b"x")
    else:
        (tmp_path / "pairs-00000.json").write_text("[]")
    plan = plan_pairs(pairs, count, tmp_path)
    assert plan.found == 0 and plan.replaces == (what != "a changed shard") and not plan.finished
    plan.write(silent)
    assert len(StoredPairs(tmp_path, made.target.base)) == count and not list(tmp_path.glob("pairs-*.json"))


def test_an_interrupted_run_leaves_no_manifest(made, tmp_path):
    cut_off(made, 25, tmp_path, after=1)
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(R2FError, match="no finished pairs"):
        StoredPairs(tmp_path, made.target.base)


def test_a_finished_folder_is_recognised_and_left_alone(made, copied, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    before = contents(copied)
    plan = plan_pairs(made, 25, copied)
    assert plan.finished and plan.found == 25 and not plan.replaces
    plan.write(lambda units: pytest.fail("a pair was made"))
    assert contents(copied) == before


@pytest.mark.parametrize("name", ["pairs-00001.safetensors", "factors-00000.safetensors", "start.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_finished_folder_is_repaired_by_the_same_command(name, damage, made, copied, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    before = contents(copied)
    if damage == "missing":
        (copied / name).unlink()
    else:
        (copied / name).write_bytes(b"x")
    made_now = []
    write_pairs(made, 25, copied, made_now.append)
    assert made_now == ([] if "start" in name else [10]) and contents(copied) == before


def test_an_interrupted_repair_keeps_the_manifest(made, copied, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    before = contents(copied)
    for shard in (0, 1):
        (copied / f"pairs-0000{shard}.safetensors").unlink()
    cut_off(made, 25, copied, after=10)
    assert (copied / "manifest.json").exists()
    write_pairs(made, 25, copied, silent)
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another count", "count 25, not 20"),
        ("another A", "another adapter, whose A differs"),
        ("another proxy", "other proxy images"),
        ("dense", "dense False, not True"),
        ("an older schema", "schema 2, not 3"),
    ],
)
def test_finished_pairs_of_another_recipe_are_refused(what, words, made, copied, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    pairs, count = made, 20 if what == "another count" else 25
    if what == "another A":
        pairs = GeneratedPairs(made.target, {name: 2 * a for name, a in made.a.items()}, made.proxy)
    elif what == "another proxy":
        pairs = GeneratedPairs(made.target, made.a, proxy_set(26, made.target.base))
    elif what == "an older schema":
        text = (copied / "manifest.json").read_text()
        (copied / "manifest.json").write_text(text.replace('"schema": 3', '"schema": 2'))
    before = contents(copied)
    with pytest.raises(R2FError, match=f"another recipe.*{words}.*another --out, or delete") as caught:
        write_pairs(pairs, count, copied, silent, dense=what == "dense")
    assert contents(copied) == before and str(copied) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_a_damaged_manifest_is_not_overwritten(text, made, copied):
    (copied / "manifest.json").write_text(text)
    with pytest.raises(R2FError, match=r"manifest.json' is damaged: delete the folder"):
        write_pairs(made, 25, copied, silent)
    assert (copied / "manifest.json").read_text() == text


def test_an_unreadable_manifest_is_one_sentence(made, copied):
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").mkdir()
    for read in (lambda: write_pairs(made, 25, copied, silent), lambda: read_manifest(copied / "manifest.json")):
        with pytest.raises(R2FError, match=r"manifest.json' cannot be read \(Is a directory\)"):
            read()


def test_a_shard_is_written_while_the_next_one_is_made(made, written, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    batches, write, second = made.batches, shards.write_tensors, threading.Event()

    def watched(start=0, stop=None):
        if start == 10:
            second.set()
        yield from batches(start, stop)

    def waiting(path, tensors):
        assert second.wait(60)
        write(path, tensors)

    monkeypatch.setattr(made, "batches", watched)
    monkeypatch.setattr(shards, "write_tensors", waiting)
    write_pairs(made, 25, tmp_path, silent)
    assert contents(tmp_path) == contents(written)


def test_an_error_of_the_writer_ends_the_run_and_the_same_call_goes_on(made, written, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)

    def full(path, tensors):
        if path.name == "factors-00001.safetensors":
            raise R2FError("cannot write: free some space.")
        files.write_tensors(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(R2FError, match="free some space"):
        patch.setattr(shards, "write_tensors", full)
        write_pairs(made, 25, tmp_path, silent)
    assert not (tmp_path / "manifest.json").exists() and (tmp_path / "pairs-00000.json").exists()
    write_pairs(made, 25, tmp_path, silent)
    assert contents(tmp_path) == contents(written)


def test_an_interrupt_leaves_the_shard_that_is_being_written_whole(made, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    batches, write, interrupted = made.batches, shards.write_tensors, threading.Event()

    def stopped(start=0, stop=None):
        if start == 10:
            interrupted.set()
            raise KeyboardInterrupt
        yield from batches(start, stop)

    def slow(path, tensors):
        assert interrupted.wait(60)
        write(path, tensors)

    monkeypatch.setattr(made, "batches", stopped)
    monkeypatch.setattr(shards, "write_tensors", slow)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(made, 25, tmp_path, silent)
    assert sorted(contents(tmp_path)) == [
        "factors-00000.safetensors",
        "pairs-00000.json",
        "pairs-00000.safetensors",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shards_of_a_gpu_are_smaller_than_its_passes(tmp_path, monkeypatch):
    base = load_base(device="cuda")
    target = Target(base, (AdaptedLayer("blocks.0.attn.qkv", 384, 128, 8, 2.0),))
    pairs = GeneratedPairs(target, {target.names[0]: torch.randn(8, 128, device="cuda")}, load_images("embedded"))
    monkeypatch.setattr(generate, "GPU_SHARD_BYTES", 4 << 20)
    cut_off(pairs, 400, tmp_path / "two", after=100)
    for folder in ("one", "two"):
        write_pairs(pairs, 400, tmp_path / folder, silent)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    stored = StoredPairs(tmp_path / "one", base)
    assert 10 < stored.batch_groups < 100 < pairs.batch_groups and len(stored) == 400
    (whole,) = pairs.batches(0, 400)
    updates = stored.updates(0, 400)[target.names[0]]
    torch.testing.assert_close(updates, whole.updates[target.names[0]], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("part", ["update", "gradient"])
def test_pairs_that_are_not_finite_are_refused_when_made(part, made, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BATCH_GROUPS", 10)
    batches = made.batches

    def spoiled(start=0, stop=None):
        for batch in batches(start, stop):
            if start <= 13 < stop:
                tensors = batch.updates if part == "update" else batch.gradients.delta
                tensors[LINEAR[1]][13 - start, 0, 0] = float("inf")
            yield batch

    monkeypatch.setattr(made, "batches", spoiled)
    with pytest.raises(R2FError, match=rf"{LINEAR[1]} of victim 13 holds NaN or infinity"):
        write_pairs(made, 25, tmp_path, silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "factors-00000.safetensors",
        "pairs-00000.json",
        "pairs-00000.safetensors",
    ]


@pytest.mark.parametrize(
    ("key", "words"), [("batch_groups", "GPUs of different memory"), ("base_sha256", "other weights of the base")]
)
def test_processes_that_would_make_other_files_are_refused(key, words, made, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.distributed, "gather", lambda part: [part, {**part, key: "of another process"}])
    with pytest.raises(R2FError, match=f"same files \\({words}\\)"):
        plan_pairs(made, 25, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_space_is_asked_for_before_the_first_shard(made, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: Usage(0, 0, 10_000))
    with pytest.raises(R2FError, match="ask for fewer pairs"):
        write_pairs(made, 25, tmp_path, silent)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
import torch
from cases import LINEAR, proxy_set, target_of, tiny_base
from r2f_ext.pairs import SimulatedPairs, Training, generate, write_pairs
torch.manual_seed(0)
base = tiny_base(torch.float32)
target = target_of(base, LINEAR)
a = {layer.name: torch.randn(layer.rank, layer.d_in) / 5 for layer in target.layers}
pairs = SimulatedPairs(target, a, proxy_set(1500, base), Training(steps=3, dropout=0.1), per_victim_a=1)
write_pairs(pairs, 1500, sys.argv[1], lambda units: print(units, flush=True))
"""


def test_a_run_ended_by_sigkill_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """A real process, a real signal, in the middle of its shards; this process makes the others."""

    def start(folder):
        # The package that is under test here, whether it is installed or lies in the checkout.
        places = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parents[1])])
        environment = {**os.environ, "PYTHONPATH": places}
        words = [sys.executable, "-c", KILLED, str(folder)]
        return subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    folder = tmp_path / "killed"
    process, until = start(folder), time.monotonic() + 400
    while not (folder / "pairs-00003.safetensors").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (folder / "manifest.json").exists()
    whole = len(list(folder.glob("pairs-*.json")))
    assert 3 <= whole < 15
    printed = []
    for place in (folder, tmp_path / "fresh"):
        monkeypatch.setattr(sys, "argv", ["", str(place)])
        exec(KILLED, {})
        printed.append(capsys.readouterr().out.split())
    assert [len(each) for each in printed] == [15 - whole, 15]
    assert contents(folder) == contents(tmp_path / "fresh")


def test_the_planned_size_is_that_on_disk(made, tmp_path):
    for folder in ("factors", "dense"):
        plan = plan_pairs(made, 25, tmp_path / folder, dense=folder == "dense")
        plan.write(silent)
        on_disk = sum(p.stat().st_size for p in (tmp_path / folder).glob("*-0*.safetensors"))
        assert 0.8 * on_disk < plan.size < on_disk
