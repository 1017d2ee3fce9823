"""Bad input, full disks and Ctrl-C: one sentence, the right code, nothing half-written."""

import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import CONFIG, WEIGHTS, changed_config, changed_weights, peft_model, save
from cli_cases import few_steps, files_under, refused, run
from peft import IA3Config, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

import r2f_ext
from r2f_ext import files

REPOSITORY = Path(r2f_ext.__file__).parent.parent
FIRST = "blocks.0.attn.qkv"
A_KEY = f"base_model.model.{FIRST}.lora_A.weight"
B_KEY = f"base_model.model.{FIRST}.lora_B.weight"


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    few_steps(monkeypatch)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def pairs_of(adapter, out, *more):
    return ("pairs", adapter, "--count", 20, "--proxy", "embedded", "--out", out, *more)


def without(name):
    return lambda source, to: os.remove(shutil.copytree(source, to) / name)


def truncated(source, to):
    path = shutil.copytree(source, to) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(source, to):
    (shutil.copytree(source, to) / WEIGHTS).unlink()
    torch.save({}, to / "adapter_model.bin")


def text(content):
    return lambda source, to: (shutil.copytree(source, to) / CONFIG).write_text(content)


def config(**fields):
    return lambda source, to: changed_config(source, to, **fields)


def weights(change):
    return lambda source, to: changed_weights(source, to, change)


def nan_in_b(tensors):
    tensors[B_KEY][3, 1] = float("nan")
    return tensors


def wider(tensors):
    return {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}


ADAPTERS = {
    "missing folder": (lambda source, to: None, "does not exist"),
    "a file": (lambda source, to: to.write_text("x"), "is a file, not a folder"),
    "empty folder": (lambda source, to: to.mkdir(), f"has no {CONFIG}"),
    "missing config": (without(CONFIG), f"has no {CONFIG}"),
    "missing safetensors": (without(WEIGHTS), f"has no {WEIGHTS}"),
    "truncated safetensors": (truncated, "bytes of tensors and .* are there"),
    "pickle only": (pickle_only, "a pickle, which is never opened"),
    "broken JSON": (text("{"), "holds damaged JSON"),
    "JSON list": (text("[1]"), "does not hold a JSON object"),
    "empty config": (text(""), "holds damaged JSON"),
    "DoRA": (config(use_dora=True), "DoRA"),
    "IA3": (config(peft_type="IA3"), "has peft_type IA3"),
    "LoRA bias": (config(lora_bias=True), "LoRA bias"),
    "trained biases": (config(bias="all"), "trained biases"),
    "pissa": (config(init_lora_weights="pissa"), "has init_lora_weights .*path_initial_model_for_weight_conversion"),
    "other rank in config": (config(r=4), "has 8 rows, while .* gives r = 4"),
    "other rank pattern": (
        config(rank_pattern={"attn.qkv": 2}),
        f"rank 2 for {FIRST} in its config.* and 8 in its file",
    ),
    "other input width": (weights(wider), "does not fit base 'embedded'"),
    "layers the base lacks": (
        weights(lambda w: {k.replace("blocks.3", "blocks.9"): v for k, v in w.items()}),
        "does not fit base 'embedded'",
    ),
    "modules the base lacks": (config(target_modules=["q_proj"]), "Target modules .*q_proj.* not found"),
    "half of the factors": (weights(lambda w: {k: v for k, v in w.items() if k != A_KEY}), f"B of {FIRST} but no A"),
    "no factors": (weights(lambda w: {"x": torch.zeros(1)}), "holds no LoRA factors"),
    "NaN": (weights(nan_in_b), "NaN or infinity in"),
    "infinity": (weights(lambda w: {k: v / 0 for k, v in w.items()}), "NaN or infinity in"),
    "all-zero B": (weights(lambda w: {k: v * ("lora_A" in k) for k, v in w.items()}), "every B is zero"),
}


@pytest.mark.parametrize(("make", "words"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_bad_adapters(make, words, adapter_folder, tmp_path, out, capsys):
    make(adapter_folder, tmp_path / "adapter")
    line = refused(capsys, *pairs_of(tmp_path / "adapter", out))
    assert re.search(words, line) and "adapter" in line
    assert not out.exists() or not files_under(out)


def test_a_real_ia3_and_a_real_dora_adapter(embedded, tmp_path, out, capsys):
    import copy

    ia3 = get_peft_model(copy.deepcopy(embedded.model), IA3Config(target_modules=["attn.qkv"], feedforward_modules=[]))
    assert "only plain LoRA" in refused(capsys, *pairs_of(save(ia3, tmp_path / "ia3"), out))
    dora = peft_model(embedded, use_dora=True)
    assert "DoRA" in refused(capsys, *pairs_of(save(dora, tmp_path / "dora"), out))


def test_two_clients_of_different_layers(adapter_folder, embedded, tmp_path, out, capsys):
    other = peft_model(embedded, target_modules=["mlp.fc1", "attn.qkv"])
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-3)
    words = ("--count", 40, "--proxy", "embedded", "--out", out)
    line = refused(capsys, "audit", adapter_folder, save(other, tmp_path / "b"), *words)
    assert "do not adapt the same layers" in line
    line = refused(capsys, "audit", tmp_path / "b", adapter_folder, *words)
    assert "do not adapt the same layers" in line and not files_under(out)


BASES = {
    "bad timm name": ("timm:vit_no_such_thing", "unknown base model"),
    "missing folder": ("/no/such/base", "unknown base"),
    "empty timm name": ("timm:", "unknown base .timm:.: name a model after"),
}


@pytest.mark.parametrize(("base", "words"), BASES.values(), ids=BASES.keys())
@pytest.mark.parametrize("command", ["pairs", "audit", "phase0"])
def test_unknown_bases(base, words, command, adapter_folder, out, capsys):
    adapter = [] if command == "phase0" else [adapter_folder]
    assert re.search(words, refused(capsys, command, *adapter, "--base", base, "--out", out))
    assert not out.exists() or not files_under(out)


def test_demo_has_its_own_base(out, capsys):
    assert "leave --base out" in refused(capsys, "demo", "--base", "timm:vit_tiny_patch16_224", "--out", out)


@pytest.mark.parametrize("command", ["pairs", "audit"])
@pytest.mark.parametrize("images", [0, 1])
def test_proxies_without_enough_images(images, command, adapter_folder, tmp_path, out, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(images):
        Image.new("RGB", (32, 32), (i, 90, 200)).save(folder / f"{i}.png")
    line = refused(capsys, command, adapter_folder, "--proxy", folder, "--count", 40, "--out", out)
    assert ("has no images" if images == 0 else "needs at least 2 images") in line
    assert not files_under(out)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--proxy", "nothing"), "unknown images 'nothing'"),
        (("--count", 0), "at least 40, got 0"),
        (("--count", -5), "at least 40, got -5"),
        (("--seed", -1), "--seed must be at least 0"),
        (("--count", 39), "at least 40"),
        (("--private", "embedded:999"), "has 100 images, counted from 0"),
        (("--private", "no-such-folder"), "unknown images"),
        (("--private", "embedded:3,100"), "has 100 images, counted from 0"),
        (("--seed", 2**63), "--seed must be at most"),
    ],
)
def test_bad_numbers_and_names(words, sentence, adapter_folder, out, capsys):
    defaults = ("--proxy", "embedded", "--count", 60)
    assert sentence in refused(capsys, "audit", adapter_folder, *defaults, *words, "--out", out)
    assert not files_under(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_here(adapter_folder, out, capsys):
    assert "use --device cpu" in refused(capsys, *pairs_of(adapter_folder, out), "--device", "cuda")


def commands_with_out(stages):
    """Every command that writes, without its --out."""
    return {
        "audit": ("audit", stages.adapter, "--count", 40, "--proxy", "embedded"),
        "demo": ("demo",),
        "phase0": ("phase0", "--count", 1),
        "pairs": ("pairs", stages.adapter, "--count", 20, "--proxy", "embedded"),
        "fit": ("fit", stages.pairs),
        "decode": ("decode", stages.adapter, "--pairs", stages.pairs, "--decoders", stages.decoders),
        "invert": ("invert", stages.adapter, "--pairs", stages.pairs),
    }


NAMES = ("audit", "demo", "phase0", "pairs", "fit", "decode", "invert")


@pytest.mark.parametrize("name", NAMES)
def test_out_that_cannot_be_written_to(name, stages, tmp_path, capsys, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    words = commands_with_out(stages)[name]
    for place in (blocker, blocker / "below"):
        assert "choose another folder" in refused(capsys, *words, "--out", place)
    assert blocker.read_text() == "mine"

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", denied)
    assert "(Permission denied)" in refused(capsys, *words, "--out", tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(adapter_folder, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "Permission denied" in refused(capsys, *pairs_of(adapter_folder, closed))


def test_json_that_cannot_be_written(stages, tmp_path, out, capsys):
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, *pairs_of(stages.adapter, out), "--json", tmp_path / "file" / "x.json")
    assert "cannot write" in line
    assert "is a folder" in refused(capsys, *pairs_of(stages.adapter, out), "--json", tmp_path)
    assert not out.exists()


def edit_manifest(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **fields}))


PAIRS = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no finished pairs"),
    "broken manifest": (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
    "damaged manifest": (lambda f: edit_manifest(f, layers=[{"name": "x"}]), "is damaged"),
    "other schema": (lambda f: edit_manifest(f, schema=0), "schema 0"),
    "missing shard": (lambda f: (f / "pairs-00000.safetensors").unlink(), "missing or damaged"),
    "torn shard": (lambda f: os.truncate(f / "pairs-00000.safetensors", 5000), "missing or damaged"),
    "missing start": (lambda f: (f / "start.safetensors").unlink(), "missing or damaged"),
    "not a folder": (lambda f: shutil.rmtree(f), "no finished pairs"),
}


@pytest.mark.parametrize("name", ["fit", "decode", "invert"])
@pytest.mark.parametrize(("damage", "words"), PAIRS.values(), ids=PAIRS.keys())
def test_damaged_pairs(damage, words, name, stages, tmp_path, out, capsys):
    folder = shutil.copytree(stages.pairs, tmp_path / "pairs")
    damage(folder)
    command = [folder if word == stages.pairs else word for word in commands_with_out(stages)[name]]
    assert words in refused(capsys, *command, "--out", out)
    assert not files_under(out)


def test_pairs_and_decoders_of_another_adapter(stages, embedded, tmp_path, out, capsys):
    other = peft_model(embedded, seed=5)
    with torch.no_grad():
        other.base_model.model.get_submodule(FIRST).lora_B["default"].weight.fill_(1e-3)
    folder = save(other, tmp_path / "other")
    for words in (("invert",), ("decode", "--decoders", stages.decoders)):
        line = refused(capsys, words[0], folder, "--pairs", stages.pairs, *words[1:], "--out", out)
        assert "were made for another adapter" in line
    assert run("pairs", stages.adapter, "--count", 24, "--proxy", "embedded", "--out", tmp_path / "p") == 0
    line = refused(
        capsys, "decode", stages.adapter, "--pairs", tmp_path / "p", "--decoders", stages.decoders, "--out", out
    )
    assert "fitted to other pairs" in line and not files_under(out)
    line = refused(
        capsys, "decode", stages.adapter, "--pairs", stages.pairs, "--decoders", tmp_path / "none", "--out", out
    )
    assert "no fitted decoders" in line


def test_too_few_pairs_to_fit(stages, tmp_path, out, capsys):
    assert run("pairs", stages.adapter, "--count", 10, "--proxy", "embedded", "--out", tmp_path / "p") == 0
    assert "at least 20 are needed" in refused(capsys, "fit", tmp_path / "p", "--out", out)
    line = refused(capsys, "invert", stages.adapter, "--pairs", tmp_path / "p", "--out", out)
    assert "at least 20 proxy pairs" in line and not files_under(out)


@pytest.mark.parametrize("damage", ["missing", "NaN", "two adapters", "text", "other layers"])
def test_bad_gradients(damage, stages, tmp_path, out, capsys, monkeypatch):
    from r2f_ext.cli import invert

    monkeypatch.setattr(invert, "run_routes", lambda *args: pytest.fail("time was spent first"))
    path = tmp_path / "g.safetensors"
    gradients = load_file(stages.gradients)
    if damage == "NaN":
        gradients[FIRST][0, 1, 2] = float("nan")
    elif damage == "two adapters":
        gradients = {name: torch.cat([g, g]) for name, g in gradients.items()}
    elif damage == "other layers":
        gradients = {"x": torch.zeros(1)}
    if damage == "text":
        path.write_text("x")
    elif damage != "missing":
        save_file(gradients, path)
    words = ("invert", stages.adapter, "--pairs", stages.pairs, "--gradients", path, "--out", out)
    assert str(path) in refused(capsys, *words)
    assert not files_under(out)


@pytest.mark.parametrize("where", ["write", "rename"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "demo"])
def test_full_disk(where, name, stages, out, capsys, monkeypatch):
    def full(*args, **options):
        if where == "write":
            for path in args:
                if isinstance(path, Path):
                    path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "write":
        monkeypatch.setattr(files, "save_file", full)
        monkeypatch.setattr(files, "_write", full)
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: full(path))
    else:
        monkeypatch.setattr(files.os, "replace", full)
    line = refused(capsys, *commands_with_out(stages)[name], "--out", out)
    assert "cannot write" in line and "No space left on device" in line and str(out) in line
    assert not [path for path in files_under(out) if not path.startswith("unfinished/")]  # a fit goes on from there


def test_full_disk_in_the_demo(stages, out, capsys, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert "No space left on device" in refused(capsys, "demo", "--out", out)
    assert not files_under(out)


# Where each command is when Ctrl-C arrives: early, in the middle, and while the last file is being written.
INTERRUPTS = {
    "audit": (
        "r2f_ext.audit.inputs.load_base",
        "r2f_ext.inversion.routes.matching.match",
        "r2f_ext.audit.write.write_html",
    ),
    "demo": ("r2f_ext.audit.demo.load_base", "r2f_ext.audit.victims.get_peft_model", "r2f_ext.audit.demo.run_phase0"),
    "phase0": ("r2f_ext.cli.inputs.load_images", "r2f_ext.inversion.phase0.exact_gradients"),
    "pairs": ("r2f_ext.audit.inputs.read_adapter", "r2f_ext.pairs.generate.project", "r2f_ext.pairs.shards.sha256"),
    "fit": ("r2f_ext.pairs.stored.safe_open", "r2f_ext.decoders.ridge.gram", "r2f_ext.decoders.store.write_text"),
    "decode": ("r2f_ext.cli.decode.stack_updates", "r2f_ext.cli.decode.load_decoder"),
    "invert": (
        "r2f_ext.inversion.amortised.gram",
        "r2f_ext.inversion.routes.amortised_refined.match",
        "r2f_ext.cli.invert.write_images",
    ),
}
# Whole files of earlier steps may stay; these must not be there, for they say that a command finished.
LAST_FILES = {"report.json", "manifest.json", "decoders.json", "gradients.safetensors", "phase0.png"}


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in INTERRUPTS.items() for place in places])
def test_ctrl_c(name, place, stages, out, capsys, monkeypatch):
    importlib.import_module(place.rpartition(".")[0])

    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    monkeypatch.setattr("r2f_ext.audit.demo.FASHION_VICTIMS", 2)
    monkeypatch.setattr("r2f_ext.audit.demo.FACE_VICTIMS", 2)
    assert "interrupted" in refused(capsys, *commands_with_out(stages)[name], "--out", out, code=130)
    left = files_under(out) if out.exists() else []
    allowed = {"gradients.safetensors"} if place.endswith("write_html") else set()
    assert not {Path(path).name for path in left} & (LAST_FILES - allowed)
    assert not [path for path in left if ".partial" in path]


@pytest.mark.parametrize("writer", ["save_file", "_write"])
def test_ctrl_c_while_a_file_is_written(writer, stages, out, capsys, monkeypatch):
    def stop(*args, **options):
        next(path for path in args if isinstance(path, Path)).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, writer, stop)
    refused(capsys, *pairs_of(stages.adapter, out), code=130)
    assert not [name for name in files_under(out) if name == "manifest.json" or name.endswith(".partial")]
    assert not [path for path in out.rglob("*") if path.is_file() and path.read_bytes() == b"half of it"]


def test_ctrl_c_while_torch_loads(monkeypatch, capsys, out):
    """`main` imports torch itself, so an interrupt there is an interrupt like any other."""

    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", stop)
    assert "interrupted" in refused(capsys, "env", code=130)


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_real_signal(number, code, word, adapter_folder, out):
    words = ["pairs", str(adapter_folder), "--count", "3000", "--proxy", "embedded", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "r2f_ext.cli", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # What a shell starts in the background ignores SIGINT, and so does all that it starts, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: out.exists() and any(out.glob("pairs-*.safetensors")), process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, errors
    (line,) = errors.decode().splitlines()
    assert line.startswith(f"r2f pairs: {word}; nothing half-written was left behind, and the same command goes on")
    assert not (out / "manifest.json").exists() and not list(out.glob(".*"))


@pytest.mark.slow
def test_a_real_refusal_has_one_line(tmp_path):
    """No warning of any library beside the sentence."""
    words = ["pairs", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "r2f_ext.cli", *words], cwd=REPOSITORY, capture_output=True, timeout=120
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"does not exist" in done.stderr


def test_victims_that_diverge_and_pairs_that_are_not_finite(stages, tmp_path, out, capsys):
    line = refused(capsys, *pairs_of(stages.adapter, out), "--steps", 3, "--lr", "1e9")
    assert "the training of victim 0 diverged" in line and "--lr 1e+09 is too large" in line and not files_under(out)
    folder = shutil.copytree(stages.pairs, tmp_path / "pairs")
    tensors = load_file(folder / "pairs-00000.safetensors")
    tensors[f"update/{FIRST}"][3, 0, 0] = float("nan")
    save_file(tensors, folder / "pairs-00000.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = files.sha256(folder / "pairs-00000.safetensors")
    edit_manifest(folder, shards=manifest["shards"])
    for words in (("fit", folder), ("invert", stages.adapter, "--pairs", folder)):
        assert f"holds NaN or infinity in update/{FIRST}" in refused(capsys, *words, "--out", out)


def test_the_same_pairs_again_and_others_in_their_place(stages, tmp_path, capsys):
    folder, printed = shutil.copytree(stages.pairs, tmp_path / "pairs"), tmp_path / "p.json"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    same = ("pairs", stages.adapter, "--count", 40, "--proxy", "embedded", "--out", folder, "--json", printed)
    assert run(*same) == 0
    assert "holds these 40 pairs already" in " ".join(capsys.readouterr().out.split())
    assert json.loads(printed.read_text())["made"] == 0
    for more, words in ((("--seed", 1), "other proxy images"), (("--count", 30), "count 40, not 30")):
        line = refused(capsys, *same, *more)
        assert "finished pairs of another recipe" in line and words in line and "another --out" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "pairs-00000.safetensors").unlink()
    assert run(*same) == 0 and json.loads(printed.read_text())["made"] == 40
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_unfinished_run_goes_on_or_starts_anew_and_says_which(stages, out, capsys, monkeypatch):
    monkeypatch.setattr("r2f_ext.pairs.generate.BATCH_GROUPS", 10)
    with monkeypatch.context() as patch:
        patch.setattr("r2f_ext.pairs.shards._finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        line = refused(capsys, *pairs_of(stages.adapter, out), code=130)
        assert "the same command goes on from what is finished" in line
    (out / "pairs-00001.safetensors").write_bytes(b"torn")
    assert run(*pairs_of(stages.adapter, out), "--json", out.parent / "j") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "holds 10 of the 20 pairs: only the others are made" in said and "10 pairs made" in said
    assert json.loads((out.parent / "j").read_text())["made"] == 10
    (out / "manifest.json").unlink()
    (out / "pairs-00000.json").write_text(json.dumps({"name": "pairs-00000.safetensors", "run": "another"}))
    assert run(*pairs_of(stages.adapter, out)) == 0
    assert "unfinished pairs of another recipe: they are removed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pairs", "refusal"])
def test_a_path_that_the_terminal_cannot_show(command, adapter_folder, tmp_path):
    """An ASCII terminal, and a folder whose name is not valid in any encoding."""
    out = tmp_path / os.fsdecode("ünï→".encode() + b"\xff")
    words = ["pairs", str(adapter_folder if command == "pairs" else tmp_path / "none→")]
    words += ["--count", "4", "--proxy", "embedded", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "r2f_ext.cli", *words],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=200,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    shown = done.stdout + done.stderr
    assert done.returncode == (0 if command == "pairs" else 2) and b"Traceback" not in shown
    assert b"\\u2192" in shown and (command == "refusal" or (out / "manifest.json").exists())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "r2f_ext.cli", "env"],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        "r2f env: No space left on device: free some space or choose another disk."
    ]


STAGES = {
    "audit": ("matching", "r2f_ext.inversion.routes.matching.match"),
    "pairs": ("pairs", "r2f_ext.pairs.shards.sha256"),
    "fit": ("fit", "r2f_ext.decoders.ridge.gram"),
    "invert": ("amortised_refined", "r2f_ext.inversion.routes.amortised_refined.match"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_stops_is_not_shown_as_finished(name, error, stages, out, capsys, monkeypatch):
    stage, place = STAGES[name]
    importlib.import_module(place.rpartition(".")[0])

    def stop(*args, **options):
        raise error

    monkeypatch.setattr(place, stop)
    words = [str(word) for word in (*commands_with_out(stages)[name], "--out", out)]
    assert run(*words) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split(":")[0].split()[-1:] == [stage]]
    assert len(lines) == 1 and "stopped after" in lines[0] and "/s" not in lines[0]
