"""Reads a safetensors file of unknown origin: its header is checked against the file before any tensor is made.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, little-endian, with the length of the header;
the header, a JSON object `name -> {dtype, shape, data_offsets}`; then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from r2f_ext.errors import R2FError, listed, plain

MAX_HEADER = 4 * 2**20  # bytes; 20,000 tensors with names of 100 characters
MAX_TENSORS = 20_000
MAX_FILE = 2 * 2**30  # bytes; more than a whole ViT-g saved beside its adapter
MAX_TEXT = 2**20  # bytes of a JSON file beside the tensors
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# What else is found under the name of a safetensors file: its first bytes, what it is, and the remedy.
DISGUISES = (
    (b"PK\x03\x04", "a pickle of PyTorch (a zip archive)", "which is never opened: save it as safetensors"),
    (b"version https://git-lfs", "a pointer of Git LFS", "not the file itself: run `git lfs pull`"),
    (b"<", "a web page or XML", "not the file that the page offers: download it again"),
    (b"GGUF", "a GGUF file", "not safetensors: save the adapter with PEFT's save_pretrained"),
    (b"{", "bare JSON", "not safetensors: save the adapter with PEFT's save_pretrained"),
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header: its shape, its type as safetensors names it, and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, as they are stored and in that order.

    Raises:
        R2FError: the file cannot be read, is not safetensors, or its header and its bytes disagree.
    """
    header = read_header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise R2FError(
            f"{plain(path, 400)} cannot be loaded by safetensors ({plain(error)}): copy it again."
        ) from error
    return {entry.name: tensors[entry.name] for entry in header}


def read_header(path: Path) -> list[TensorEntry]:
    """The checked header of a safetensors file, in the order of the bytes.

    Raises:
        R2FError: as `read_tensors`.
    """
    where = plain(path, 400)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE:
            raise R2FError(f"{where} has {size:,} bytes, more than the {MAX_FILE:,} that an adapter is read up to.")
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise R2FError(f"{where} {_misfit(start, size, length)}.")
        file.seek(8)
        text = file.read(length)
    header = parse_json(text, path)
    if len(header) > MAX_TENSORS:
        raise R2FError(f"{where} lists {len(header):,} tensors, more than the {MAX_TENSORS:,} of any adapter.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise R2FError(f"{where} has metadata that are not text: save it again with safetensors.")
    entries = [_entry(name, fields, where) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_extents(entries, size - 8 - length, where)
    return entries


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a device, a pipe or a folder is refused, and never waited for.

    Raises:
        R2FError: there is no such file, it is not a regular one, or it may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError as error:
        raise R2FError(f"{plain(path, 400)} may not be read: change its permissions.") from error
    except OSError as error:
        raise R2FError(f"{plain(path, 400)} cannot be read ({error.strerror}): copy the folder again.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise R2FError(f"{plain(path, 400)} is not a regular file: pass the folder that PEFT's save_pretrained wrote.")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most `MAX_TEXT` bytes.

    Raises:
        R2FError: the file cannot be read or is not such an object.
    """
    with open_regular(path) as file:
        text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise R2FError(f"{plain(path, 400)} is larger than {MAX_TEXT:,} bytes, too large for what it should hold.")
    return parse_json(text, path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key stands twice and every number is finite.

    Raises:
        R2FError: it is not UTF-8, not JSON, nested too deeply, not an object, or a key stands twice.
    """
    where = plain(path, 400)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise R2FError(f"{where} holds text that is not UTF-8: save it again.") from error
    except RecursionError as error:
        raise R2FError(f"{where} holds JSON that is nested too deeply: save it again.") from error
    except ValueError as error:
        raise R2FError(f"{where} holds damaged JSON ({plain(error)}): save it again.") from error
    if not isinstance(value, dict):
        raise R2FError(f"{where} does not hold a JSON object: save it again.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {plain(name, 60)} stands twice")
        found[name] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _misfit(start: bytes, size: int, length: int) -> str:
    """Why a file whose first 8 bytes do not give the length of a header is no safetensors file."""
    if size == 0:
        return "is empty (0 bytes): copy or save it again"
    if size >= 8 and length <= MAX_HEADER:
        return f"is cut short or damaged: it claims a header of {length:,} bytes and {size - 8:,} follow: copy it again"
    for magic, what, remedy in DISGUISES:
        if start.lstrip().startswith(magic):
            return f"is {what}, {remedy}"
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a pickle, which is never opened: save it as safetensors"
    if size < 8:
        return f"has only {size} bytes, less than the start of a safetensors file: copy it again"
    return f"is not a safetensors file: its first bytes claim a header of {length:,} bytes; copy or save it again"


def _entry(name: str, fields: Any, where: str) -> TensorEntry:
    shown = plain(name)
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise R2FError(f"{where} does not give dtype, shape and data_offsets of {shown}: save it again.")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise R2FError(f"{where} stores {shown} as {plain(dtype, 40)}: save it in float32, float16 or bfloat16.")
    if not _sizes(shape) or len(shape) > 8:
        raise R2FError(f"{where} gives {shown} a shape that is no list of up to 8 sizes: save it again.")
    if not _sizes(offsets) or len(offsets) != 2:
        raise R2FError(f"{where} gives {shown} data_offsets that are no two positions: save it again.")
    extent = prod(shape) * ITEM_SIZE[dtype]
    if offsets[1] - offsets[0] != extent:
        raise R2FError(
            f"{where} gives {shown} {offsets[1] - offsets[0]:,} bytes, but {dtype} of shape {plain(shape)} has "
            f"{extent:,}: save it again."
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def _check_extents(entries: list[TensorEntry], available: int, where: str) -> None:
    """The tensors lie one after the other, from the first byte to the last."""
    end = 0
    for entry in entries:
        if entry.begin != end:
            how = "overlap" if entry.begin < end else "leave a gap"
            raise R2FError(f"{where} has tensors that {how} at {plain(entry.name)}: save it again.")
        end = entry.end
    if end > available:
        missing = [entry.name for entry in entries if entry.end > available]
        raise R2FError(
            f"{where} is cut short: its header describes {end:,} bytes of tensors and {available:,} are there "
            f"({listed(missing, 3)} missing): copy it again."
        )
    if end < available:
        raise R2FError(f"{where} has {available - end:,} bytes after its last tensor: save it again with safetensors.")
