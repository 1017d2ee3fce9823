"""Errors end in one sentence and the right exit code, whatever they are."""

import os
import signal
import sys

import pytest
import torch
from cli_cases import files_under, refused, run

from r2f_ext.cli import execute
from r2f_ext.cli.failures import TRACEBACK


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
    import warnings

    before = list(warnings.filters)
    failing(MemoryError())
    refused(capsys, "env")
    assert warnings.filters == before
