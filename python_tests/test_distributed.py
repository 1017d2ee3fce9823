"""Two processes as torchrun starts them, against one: the same files, and a clear end when one dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import refused, run
from safetensors.torch import load_file

import r2f_ext
from r2f_ext import distributed
from r2f_ext.decoders import ANY_A_KINDS
from r2f_ext.decoders.learned import Learned

REPOSITORY = Path(r2f_ext.__file__).parent.parent
LOST = "another process of this run has died: run the same command again, and it goes on from what is finished."
# One write a line: torchrun starts Python unbuffered, and print would write the newline apart.
SLOW = """
import os, sys, time
from r2f_ext.pairs import shards
real = shards._write_shard
def slowly(folder, shard, *rest):
    real(folder, shard, *rest)
    sys.stdout.write(f"wrote {shard} {os.environ['RANK']} {os.getpid()}\\n")
    sys.stdout.flush()
    time.sleep(0.5 if os.environ["RANK"] == "0" else 3600)
shards._write_shard = slowly
from r2f_ext.cli import main
sys.exit(main())
"""
SLOW_FIT = """
import os, sys, time
from r2f_ext.decoders.learned import Learned
real = Learned.finish
def slowly(decoder):
    rank = os.environ["RANK"]
    sys.stdout.write(f"learns {decoder.kind} {rank if decoder.kind == 'mlp' else '-'} {os.getpid()}\\n")
    sys.stdout.flush()
    time.sleep(3600 if decoder.kind == "mlp" else 0)
    real(decoder)
Learned.finish = slowly
from r2f_ext.cli import main
sys.exit(main())
"""


def start(*words, code=None):
    """A command on two processes."""
    program = ["-m", "r2f_ext.cli"] if code is None else [code]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, *program, *map(str, words)]
    # On the CPU, also where there is one GPU: two processes would need two.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment = {**os.environ, **hidden}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return out


@pytest.fixture
def alone(monkeypatch, capsys):
    """alone(*words) runs a command in this process, on the CPU and in one thread as `start` does; what it printed."""

    def command(*words):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        capsys.readouterr()
        try:
            assert run(*words, "--device", "cpu") == 0
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return command


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_alone_there_is_nothing_to_wait_for():
    assert not distributed.wanted() and (distributed.rank(), distributed.world_size()) == (0, 1)
    with distributed.processes(cuda=False):
        distributed.barrier()
        assert distributed.gather("x") == ["x"]
    assert distributed.device_of("cuda") == "cuda" and distributed.device_of("cpu") == "cpu"


def test_other_commands_run_alone(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "only pairs and fit run on several processes" in refused(capsys, "demo", "--out", tmp_path / "out")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.device_of("cuda") == "cuda:1" and distributed.device_of("cpu") == "cpu"


def test_more_processes_than_gpus(monkeypatch, capsys, tmp_path, adapter_folder):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = refused(capsys, "pairs", adapter_folder, "--device", "cuda", "--out", tmp_path / "out")
    assert "more processes than GPUs here (1): start at most 1 with --nproc-per-node" in line


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(adapter_folder, tmp_path, alone):
    words = ("pairs", adapter_folder, "--count", 450, "--proxy", "embedded", "--out")
    alone(*words, tmp_path / "one")
    out = finished(start(*words, tmp_path / "two", "--json", tmp_path / "two.json"))
    assert out.count("450 pairs made, ") == 1  # only the first process speaks
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "two.json").read_text())["count"] == 450

    two_fit_as_one(alone, tmp_path / "one", tmp_path)


@pytest.mark.slow
def test_two_processes_fit_decoders_for_any_a_as_one(adapter_folder, tmp_path, alone):
    words = ("pairs", adapter_folder, "--count", 40, "--proxy", "embedded", "--per-victim-a")
    assert run(*words, "--out", tmp_path / "pairs") == 0
    two_fit_as_one(alone, tmp_path / "pairs", tmp_path, "--kind", *ANY_A_KINDS)


def two_fit_as_one(alone, pairs, folder, *more):
    words = [("fit", pairs, *more, "--out", folder / f"fit{n}", "--json", folder / f"{n}.json") for n in (1, 2)]
    two = start(*words[1])
    shown = [alone(*words[0]), finished(two)]
    assert shown[0].splitlines()[-6:] == shown[1].splitlines()[-6:]
    assert json.loads((folder / "1.json").read_text()) == json.loads((folder / "2.json").read_text())
    same_decoders(folder / "fit1", folder / "fit2")


def same_decoders(one, two):
    """To the bit."""
    assert contents(one).keys() == contents(two).keys()
    for name in contents(one):
        assert "unfinished" not in name
        if name.endswith(".safetensors"):
            a, b = load_file(one / name), load_file(two / name)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_sentence_and_the_run_goes_on(adapter_folder, tmp_path, alone):
    code = tmp_path / "slow.py"
    code.write_text(SLOW)
    out = tmp_path / "two"
    words = ("pairs", adapter_folder, "--count", 600, "--proxy", "embedded", "--out", out)
    assert f"r2f pairs: {LOST}" in killed(start(*words, code=code), "wrote")
    assert not (out / "manifest.json").exists()
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("pairs-*.safetensors")}
    assert whole
    alone(*words)  # any number of processes goes on
    alone(*words[:-1], tmp_path / "one")
    assert contents(out) == contents(tmp_path / "one")
    assert all((out / name).stat().st_mtime_ns == when for name, when in whole.items())


@pytest.mark.slow
def test_a_fit_goes_on_after_a_process_was_killed_while_it_learned(stages, tmp_path, alone, monkeypatch):
    """And is that of one process: conv and unet were learned by two, mlp by one."""
    code = tmp_path / "slow.py"
    code.write_text(SLOW_FIT)
    out = tmp_path / "two"
    words = ("fit", stages.pairs, "--kind", "conv", "unet", "mlp", "--out", out)
    assert f"r2f fit: {LOST}" in killed(start(*words, code=code), "learns")
    assert contents(out) and not (out / "decoders.json").exists()
    learned, finish = [], Learned.finish
    monkeypatch.setattr(Learned, "finish", lambda decoder: (learned.append(decoder.kind), finish(decoder)))
    alone(*words)
    assert learned == ["mlp"]
    alone(*words[:-1], tmp_path / "one")
    same_decoders(tmp_path / "one", out)


def killed(process, word):
    """What is said when the second process is killed after it printed `word`, what, its rank and its number."""
    try:
        for line in process.stdout:
            if line.startswith(word) and line.split()[2] == "1":
                os.kill(int(line.split()[3]), signal.SIGKILL)
                break
        _, errors = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode != 0
    return errors.splitlines()
