"""`python -m r2f_ext.cli`, as a shell starts it: real signals, terminals and full disks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import r2f_ext

REPOSITORY = Path(r2f_ext.__file__).parent.parent


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


@pytest.mark.slow
def test_a_real_ctrl_c(adapter_folder, out):
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
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    (line,) = errors.decode().splitlines()
    assert line.startswith("r2f pairs: interrupted; nothing half-written was left behind, and the same command goes on")
    assert not (out / "manifest.json").exists() and not list(out.glob(".*"))


def test_a_real_refusal_has_one_line(tmp_path):
    """No warning of any library beside the sentence."""
    words = ["pairs", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "r2f_ext.cli", *words], cwd=REPOSITORY, capture_output=True, timeout=120
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and b"does not exist" in done.stderr


def test_a_path_that_the_terminal_cannot_show(tmp_path):
    """An ASCII terminal, and folders whose names it cannot show."""
    words = ["pairs", str(tmp_path / "none→"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "r2f_ext.cli", *words],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=200,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 2 and b"\\u2192" in done.stderr and b"Traceback" not in done.stderr


# Prints as every command does, through rich, and loads no torch.
PRINTS = """
import sys, types
from rich.console import Console
sys.modules["r2f_ext.cli.execute"] = types.SimpleNamespace(execute=lambda options: Console().print("said"))
from r2f_ext.cli import main
sys.exit(main(["env"]))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, timeout=120
        )
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        "r2f env: No space left on device: free some space or choose another disk."
    ]
