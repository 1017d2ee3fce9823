"""The header of a safetensors file against the file, and what the sentences say of other files."""

import json
import os

import pytest
import torch
from adapter_cases import assembled, factors, header_and_data
from safetensors.torch import save, save_file

from r2f_ext.errors import R2FError
from r2f_ext.models import safetensors_header
from r2f_ext.models.safetensors_header import open_regular, parse_json, read_header, read_json, read_tensors

HEADER, DATA = header_and_data({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
FLAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ALIKE = b'{"a":' + json.dumps(FLAT).encode() + b',"a":' + json.dumps(FLAT).encode() + b"}"


def reason(path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(R2FError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_what_safetensors_writes_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {**factors(), **{str(kind): torch.ones(3, 2).to(kind) for kind in kinds}, "empty": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    read = read_tensors(path)
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert {entry.name: list(entry.shape) for entry in read_header(path)} == {
        n: list(t.shape) for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"abc", "has only 3 bytes"),
        (b"PK\x03\x04" + bytes(100), "is a pickle of PyTorch"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00", "is a pickle, which is never opened"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS, not the file itself: run"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(40), "is a GGUF file"),
        (b'{"a": {"dtype": "F32"}}', "is bare JSON"),
        (b"\xff" * 64, "is not a safetensors file: its first bytes claim a header of 18,446,744,073,709,551,615 bytes"),
        (assembled(HEADER, DATA, length=3000), "is cut short or damaged: it claims a header of 3,000 bytes and"),
        (assembled(HEADER, DATA)[:-1], r"is cut short: its header describes 32 bytes of tensors and 31 are there (b"),
        (assembled(HEADER, DATA)[:60], "is cut short or damaged: it claims"),
        (assembled(HEADER, DATA + b"x"), "has 1 bytes after its last tensor"),
        (assembled(b'{"\xff": 1}', b""), "not UTF-8"),
        (assembled(b"[1]", b""), "does not hold a JSON object"),
        (assembled(b'{"a": NaN}', b""), "NaN is not a number"),
        (assembled(b"{", b""), "damaged JSON"),
        (assembled(b'{"a":' * 100_000, b""), "nested too deeply"),
        (assembled(ALIKE, bytes(8)), "key a stands twice"),
        (assembled({"a": 5}, b""), "does not give dtype, shape and data_offsets of a"),
        (assembled({"a": {**FLAT, "more": 1}}, bytes(8)), "does not give dtype, shape and data_offsets of a"),
        (assembled({"a": {**FLAT, "dtype": "F8_E4M3"}}, bytes(8)), "stores a as F8_E4M3"),
        (assembled({"a": {**FLAT, "dtype": ["F32"]}}, bytes(8)), "stores a as ['F32']"),
        (assembled({"a": {**FLAT, "dtype": "F64"}}, bytes(8)), "gives a 8 bytes, but F64 of shape [2] has 16"),
        (assembled({"a": {**FLAT, "shape": [-2]}}, bytes(8)), "gives a a shape that is no list"),
        (assembled({"a": {**FLAT, "shape": [True, 2]}}, bytes(8)), "gives a a shape that is no list"),
        (
            assembled({"a": {**FLAT, "shape": [2**40]}}, bytes(8)),
            "gives a 8 bytes, but F32 of shape [1099511627776] has",
        ),
        (assembled({"a": {**FLAT, "shape": [10**30]}}, bytes(8)), "gives a a shape that is no list"),
        (assembled({"a": {**FLAT, "data_offsets": [0]}}, bytes(8)), "data_offsets that are no two positions"),
        (assembled({"a": {**FLAT, "data_offsets": [8, 0]}}, bytes(8)), "gives a -8 bytes"),
        (assembled({"a": FLAT, "b": FLAT}, bytes(8)), "tensors that overlap at b"),
        (assembled({"a": FLAT, "b": {**FLAT, "data_offsets": [12, 20]}}, bytes(20)), "tensors that leave a gap at b"),
        (assembled({"__metadata__": [1], "a": FLAT}, bytes(8)), "metadata that are not text"),
        (assembled({"__metadata__": {"a": 1}, "a": FLAT}, bytes(8)), "metadata that are not text"),
        (assembled({f"{i}": 0 for i in range(20_001)}, b""), "lists 20,001 tensors"),
    ],
)
def test_each_fault_has_its_own_sentence(content, said, tmp_path):
    assert said in reason(tmp_path / "adapter_model.safetensors", content)


def test_a_cut_header_that_begins_like_text_is_called_cut_short(tmp_path):
    """A header of 60 or 123 bytes gives a first byte of `<` or `{`."""
    for length in b"<{":
        assert "is cut short" in reason(tmp_path / "a", bytes([length]) + bytes(7) + b"{")


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.truncate(safetensors_header.MAX_FILE + 1)  # takes no space on the disk
    with pytest.raises(R2FError, match=r"2,147,483,649 bytes, more than the 2,147,483,648"):
        read_tensors(path)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(R2FError, match="is not a regular file"):
        open_regular(tmp_path / "pipe")  # would wait for a writer for ever
    with pytest.raises(R2FError, match="is not a regular file"):
        open_regular(tmp_path)
    with pytest.raises(R2FError, match="cannot be read"):
        open_regular(tmp_path / "none")


def test_a_file_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(save({"a": torch.ones(1)}))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # the tests may run as root, whom no permission stops
    with pytest.raises(R2FError, match=r"a may not be read: change its permissions\."):
        read_tensors(path)


def test_json_files_are_bounded(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": "x" * safetensors_header.MAX_TEXT}))
    with pytest.raises(R2FError, match="larger than 1,048,576 bytes"):
        read_json(path)
    with pytest.raises(R2FError, match="damaged JSON"):
        parse_json(b'{"a": ' + b"9" * 5000 + b"}", path)  # Python reads no integer of more than 4300 digits
    assert parse_json('{"é": [1, null]}'.encode(), path) == {"é": [1, None]}
