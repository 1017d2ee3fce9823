"""Atomic writes (under its final name a file or folder is complete or absent), and digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
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
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one and it can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def need_space(folder: Path, size: int) -> None:
    """Raise R2FError when the disk under `folder` cannot hold `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise R2FError(
            f"'{folder}' needs {size / 1e9:.1f} GB but its disk has {free / 1e9:.1f} GB free: "
            "ask for fewer pairs or choose another disk."
        )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then rename what it made; on any failure that is removed.

    Args:
        write: makes a file, or a folder, which then replaces a folder of the name `path`.

    Raises:
        R2FError: the disk is full or the folder cannot be written to.
    """
    temporary = temporary_name(path)
    try:
        _remove(temporary)
        write(temporary)
        if temporary.is_dir():
            _remove_abandoned(path.parent)
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # on a full disk safetensors raises an error of its own
        reason = getattr(error, "strerror", None) or error
        raise R2FError(f"cannot write '{path}' ({reason}): free some space or choose another place.") from error
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically. Bytes of file names that are not valid UTF-8 become backslash escapes."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous CPU copies of `tensors` as safetensors, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda part: save_file(plain, part, metadata=metadata))


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


def seed_of(text: str) -> int:
    """A seed in [0, 2^32) from the digest of a text: torch's CPU generator uses only 32 bits of a seed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
