"""Files appear whole or not at all."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from r2f_ext import files
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder, sha256, write_atomically, write_tensors, write_text

REPOSITORY = Path(__file__).resolve().parents[1]


def test_text_and_tensors(tmp_path):
    write_text(tmp_path / "a.txt", "x ≤ y")
    tensors = {"a": torch.rand(3, 4).T, "b": torch.arange(3)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"k": "v"})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "x ≤ y"
    read = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "t.safetensors"]
    assert sha256(tmp_path / "a.txt") == hashlib.sha256("x ≤ y".encode()).hexdigest()


ERRORS = [OSError(errno.ENOSPC, "No space left"), OSError("odd"), SafetensorError("odd"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_keeps_what_was_there(tmp_path, error, folder):
    path = tmp_path / "a"
    if folder:
        path.mkdir()
        (path / "old").write_text("old")
    else:
        path.write_text("old")

    def half(temporary):
        if folder:
            temporary.mkdir()
            (temporary / "new").write_text("half")
        else:
            temporary.write_text("half")
        raise error

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else R2FError
    with pytest.raises(expected) as caught:
        write_atomically(path, half)
    assert list(tmp_path.iterdir()) == [path]
    assert (path / "old" if path.is_dir() else path).read_text() == "old"
    if expected is R2FError:
        assert (getattr(error, "strerror", None) or "odd") in str(caught.value) and "None" not in str(caught.value)


def test_output_folder(tmp_path):
    assert output_folder(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(R2FError, match="choose another folder"):
        output_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize("write", [lambda temporary: temporary.mkdir(), lambda temporary: temporary.write_text("new")])
def test_a_place_below_a_file_is_refused(tmp_path, write):
    (tmp_path / "file").write_text("x")
    with pytest.raises(R2FError, match="choose another place"):
        write_atomically(tmp_path / "file" / "a", write)


def test_need_space(tmp_path):
    free = files.shutil.disk_usage(tmp_path).free
    files.need_space(tmp_path, free // 2)
    with pytest.raises(R2FError, match="ask for fewer pairs"):
        files.need_space(tmp_path, 2 * free)


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_half_written_is_removed_by_the_next(tmp_path, folder):
    """A real process that is killed while it writes; what a process that still runs writes is left alone."""
    program = f"""
import os, signal
from pathlib import Path
from r2f_ext.files import write_atomically

def half(temporary):
    if {folder}:
        temporary.mkdir()
        temporary = temporary / "part"
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(Path({str(tmp_path / "a")!r}), half)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.") and left.is_dir() == folder
    elsewhere, running = tmp_path / ".b.otherhost-1.partial", files.temporary_name(tmp_path / "c")
    foreign = tmp_path / ".d.partial"
    for path in (elsewhere, running, foreign):
        path.write_text("theirs")
    output_folder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([elsewhere, running, foreign])


def test_a_folder_written_again_removes_what_a_killed_process_left_beside_it(tmp_path):
    left = files.temporary_name(tmp_path / "a")
    left = left.with_name(left.name.replace(f"-{os.getpid()}.", "-999999999."))
    left.mkdir()
    write_atomically(tmp_path / "b", lambda temporary: temporary.mkdir())
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_this_process_left_half_written_is_not_written_on(tmp_path, folder):
    """Its number can be that of a process that was killed."""
    left = files.temporary_name(tmp_path / "a")
    if folder:
        left.mkdir()
        (left / "old").write_text("old")
    else:
        left.write_text("old")
    write_atomically(tmp_path / "a", lambda temporary: temporary.mkdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not list((tmp_path / "a").iterdir())


def test_text_that_utf8_cannot_say(tmp_path):
    """A file name of bytes that are not UTF-8 reaches Python as lone surrogates."""
    write_text(tmp_path / "a", f"folder {os.fsdecode(bytes([0xFF]))}")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "folder \\udcff"
