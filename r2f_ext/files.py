"""Atomic writes: under its final name a file is complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from r2f_ext.errors import R2FError

PARTIAL = ".partial"  # ends the name of a file or folder that is being written


def cache_folder() -> Path:
    """Where downloads and trained bases are kept: `$R2F_DATA`, or `~/.cache/r2f_ext`."""
    return Path(os.environ.get("R2F_DATA", Path.home() / ".cache" / "r2f_ext"))


def output_folder(path: str | Path) -> Path:
    """Create the folder `path` if necessary and check, before any long work, that it can be written to.

    Half-written files that killed processes left in it are removed.

    Raises:
        R2FError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _remove_abandoned(folder)
    except OSError as error:
        raise R2FError(f"cannot write to '{path}' ({error.strerror or error}): choose another folder.") from error
    return folder


def temporary_name(path: Path) -> Path:
    """Where `path` is written before it is renamed: beside it, hidden, with the host and the process in the name."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")


def _remove_abandoned(folder: Path) -> None:
    """Remove the half-written files and folders of processes that ran on this machine and have ended."""
    for path in folder.glob(f".*{PARTIAL}"):
        owner, _, process = path.name.removesuffix(PARTIAL).rpartition("-")
        written_here = owner.endswith(f".{socket.gethostname()}") and process.isdecimal() and len(process) < 10
        if not written_here or psutil.pid_exists(int(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def need_space(folder: Path, size: int) -> None:
    """Raise R2FError when the disk under `folder` cannot hold `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise R2FError(
            f"'{folder}' needs {size / 1e9:.1f} GB but its disk has {free / 1e9:.1f} GB free: "
            "ask for fewer pairs or choose another disk."
        )


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, then rename it; on any failure the temporary file is removed.

    Raises:
        R2FError: the disk is full or the folder cannot be written to.
    """
    temporary = temporary_name(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise R2FError(
            f"cannot write '{path}' ({error.strerror or error}): free some space or choose another place."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Like `write_atomically`, for a whole folder. An existing folder of this name is replaced.

    Raises:
        R2FError: the disk is full or the folder cannot be written to.
    """
    temporary = temporary_name(path)
    try:
        _remove_abandoned(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise R2FError(f"cannot write '{path}' ({reason}): free some space or choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically. Bytes of file names that are not valid UTF-8 become backslash escapes."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous CPU copies of `tensors` as safetensors, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata=metadata)
        except Exception as error:  # on a full disk safetensors raises an error of its own
            raise OSError(0, str(error)) from error

    write_atomically(path, save)


def sha256_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the concatenated bytes of the tensors, in hex."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
