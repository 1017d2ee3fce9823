"""Two processes as torchrun starts them, against one: the same files, and a clear end when one dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import refused
from safetensors.torch import load_file

import r2f_ext
from r2f_ext import distributed

REPOSITORY = Path(r2f_ext.__file__).parent.parent
LOST = "another process of this run has died: run the same command again, and it goes on from what is finished."
SLOW = """
import os, sys, time
from r2f_ext.pairs import shards
real = shards._write_shard
def slowly(folder, shard, *rest):
    real(folder, shard, *rest)
    print(f"wrote {shard} {os.environ['RANK']} {os.getpid()}", flush=True)
    time.sleep(0.5 if os.environ["RANK"] == "0" else 3600)
shards._write_shard = slowly
from r2f_ext.cli import main
sys.exit(main())
"""


def start(processes, *words, code=None):
    program = ["-m", "r2f_ext.cli"] if code is None else [code]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *program, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return out


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
    assert distributed.device_of("cuda") == "cuda:1" and distributed.device_of("cpu") == "cpu"


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(adapter_folder, tmp_path):
    words = ("pairs", adapter_folder, "--count", 450, "--proxy", "embedded", "--out")
    finished(start(1, *words, tmp_path / "one"))
    out = finished(start(2, *words, tmp_path / "two", "--json", tmp_path / "two.json"))
    assert out.count("pairs, ") == 1  # only the first process speaks
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "two.json").read_text())["count"] == 450

    fits = [
        start(n, "fit", tmp_path / "one", "--out", tmp_path / f"fit{n}", "--json", tmp_path / f"{n}.json")
        for n in (1, 2)
    ]
    shown = [finished(fit) for fit in fits]
    assert shown[0].splitlines()[-6:] == shown[1].splitlines()[-6:]
    assert json.loads((tmp_path / "1.json").read_text()) == json.loads((tmp_path / "2.json").read_text())
    one, two = contents(tmp_path / "fit1"), contents(tmp_path / "fit2")
    assert one.keys() == two.keys() and not [name for name in one if "unfinished" in name]
    for name in one:
        if name.endswith(".safetensors"):
            a, b = (load_file(tmp_path / fit / name) for fit in ("fit1", "fit2"))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_sentence_and_the_run_goes_on(adapter_folder, tmp_path):
    code = tmp_path / "slow.py"
    code.write_text(SLOW)
    out = tmp_path / "two"
    words = ("pairs", adapter_folder, "--count", 600, "--proxy", "embedded", "--out", out)
    run = start(2, *words, code=code)
    try:
        for line in run.stdout:  # the second process is in the middle of its shards, then it is killed
            if line.startswith("wrote") and line.split()[2] == "1":
                os.kill(int(line.split()[3]), signal.SIGKILL)
                break
        _, errors = run.communicate(timeout=500)
    finally:
        run.kill()
    assert run.returncode != 0
    assert f"r2f pairs: {LOST}" in errors.splitlines()
    assert not (out / "manifest.json").exists()
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("pairs-*.safetensors")}
    assert whole
    finished(start(1, *words))  # any number of processes goes on
    finished(start(1, *words[:-1], tmp_path / "one"))
    assert contents(out) == contents(tmp_path / "one")
    assert all((out / name).stat().st_mtime_ns == when for name, when in whole.items())
