"""Errors, full disks and Ctrl-C end in one sentence and the right exit code, with nothing half-written."""

import errno
import importlib
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cli_cases import NAMES, commands_with_out, files_under, pairs_of, refused, run

from r2f_ext import files
from r2f_ext.cli import execute
from r2f_ext.cli.failures import TRACEBACK
from r2f_ext.pairs import shards


@pytest.fixture
def failing(monkeypatch):
    """failing(error): the next command raises it instead of running."""

    def make(error):
        def stop(options):
            raise error

        monkeypatch.setattr(execute.commands, "load", lambda name: stop)

    return make


CPU = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (MemoryError(), "out of memory: use a machine with more memory."),
        (RuntimeError(CPU), "out of memory: use a machine with more memory."),
        (torch.OutOfMemoryError(GPU), "out of memory on the GPU: run with --device cpu, or use a machine"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "run with --device cpu"),
    ],
)
def test_no_memory(error, remedy, failing, tmp_path, capsys):
    failing(error)
    line = refused(capsys, "demo", "--out", tmp_path)
    assert "out of memory" in line and remedy in line and not files_under(tmp_path)


def test_no_memory_for_so_many_pairs(failing, tmp_path, capsys):
    failing(MemoryError())
    line = refused(capsys, "phase0", "--count", 3, "--out", tmp_path)
    assert line.endswith("out of memory: ask for fewer pairs (--count), or use a machine with more memory.")


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator's refusal is Linux's")
def test_the_allocator_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(execute.commands, "load", lambda name: lambda options: torch.empty(1 << 60))
    assert "out of memory" in refused(capsys, "env")


def test_an_unexpected_error_leaves_its_traceback_under_out(failing, tmp_path, capsys):
    failing(KeyError("blocks.0\nsecond line"))
    line = refused(capsys, "demo", "--out", tmp_path / "new", code=70)
    path = tmp_path / "new" / TRACEBACK
    assert "unexpected KeyError: 'blocks.0" in line and str(path) in line and "--debug" in line
    assert path.read_text().startswith("Traceback") and "in stop" in path.read_text()


@pytest.mark.parametrize("words", [("env",), ("demo", "--out", "/proc/nowhere")])
def test_without_a_folder_it_is_a_temporary_file(words, failing, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing(ValueError())
    line = refused(capsys, *words, code=70)
    (name,) = files_under(tmp_path)
    assert name.endswith(TRACEBACK) and str(tmp_path / name) in line and "unexpected ValueError;" in line


@pytest.mark.parametrize("code", [2, 70])
def test_debug_shows_the_traceback(code, failing, tmp_path, capsys):
    failing({2: MemoryError(), 70: ZeroDivisionError("by zero")}[code])
    assert run("demo", "--out", tmp_path, "--debug") == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("r2f demo: ")


def test_sigterm_ends_like_ctrl_c_and_the_handler_is_put_back(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def stopped(options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not stop the cleaning up
            cleaned.append(True)

    monkeypatch.setattr(execute.commands, "load", lambda name: stopped)
    assert "terminated; nothing half-written" in refused(capsys, "env", code=143)
    assert cleaned and signal.getsignal(signal.SIGTERM) is before


def test_warning_filters_are_those_of_before(failing, capsys):
    before = list(warnings.filters)
    failing(MemoryError())
    refused(capsys, "env")
    assert warnings.filters == before


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
        monkeypatch.setattr(Path, "write_text", full)
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
    "demo": ("r2f_ext.audit.demo.load_base", "r2f_ext.audit.victims.get_peft_model", "r2f_ext.audit.demo.phase0"),
    "phase0": ("r2f_ext.cli.phase0.images_for", "r2f_ext.audit.phase0.exact_gradients"),
    "pairs": ("r2f_ext.audit.inputs.read_adapter", "r2f_ext.pairs.generate.project", "r2f_ext.pairs.shards.sha256"),
    "fit": ("r2f_ext.pairs.stored.safe_open", "r2f_ext.decoders.ridge.gram", "r2f_ext.decoders.store.write_text"),
    "decode": ("r2f_ext.decoders.folder.stack_updates", "r2f_ext.decoders.folder.load_decoder"),
    "invert": (
        "r2f_ext.inversion.amortised.gram",
        "r2f_ext.inversion.routes.amortised_refined.match",
        "r2f_ext.audit.invert.write_images",
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


@pytest.mark.parametrize(("owner", "writer"), [(files, "save_file"), (Path, "write_text")])
def test_ctrl_c_while_a_file_is_written(owner, writer, stages, out, capsys, monkeypatch):
    def stop(*args, **options):
        next(path for path in args if isinstance(path, Path)).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, writer, stop)
    refused(capsys, *pairs_of(stages.adapter, out), code=130)
    assert not [name for name in files_under(out) if name == "manifest.json" or name.endswith(".partial")]
    assert not [path for path in out.rglob("*") if path.is_file() and path.read_bytes() == b"half of it"]


def test_ctrl_c_while_torch_loads(monkeypatch, capsys, out):
    """`main` imports torch itself, so an interrupt there is an interrupt like any other."""

    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", stop)
    assert "interrupted" in refused(capsys, "env", code=130)


def test_sigterm_between_two_files_leaves_nothing_half_written(stages, out, capsys, monkeypatch):
    monkeypatch.setattr("r2f_ext.pairs.generate.BATCH_GROUPS", 10)
    write_shard = shards._write_shard

    def terminated_after(*args):
        write_shard(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(shards, "_write_shard", terminated_after)
    line = refused(capsys, *pairs_of(stages.adapter, out), code=143)
    assert line.startswith("r2f pairs: terminated; nothing half-written was left behind, and the same command goes on")
    assert (out / "pairs-00000.safetensors").exists() and not (out / "pairs-00001.safetensors").exists()
    assert not (out / "manifest.json").exists() and not list(out.glob(".*"))
