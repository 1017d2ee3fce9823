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
