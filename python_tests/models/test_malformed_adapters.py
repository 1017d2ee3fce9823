"""Hundreds of adapters that nobody should trust: each is read, or refused in one sentence, quickly and in place."""

import gc
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from adapter_cases import CONFIG, PATHS, PREFIX, WEIGHTS, assembled, config, factors, header_and_data, write, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from r2f_ext.errors import R2FError, plain
from r2f_ext.models import read_adapter
from r2f_ext.models.config_fields import HARMLESS_FIELDS, READ_FIELDS, USED_FIELDS, VARIANTS

RAW = save(factors())
HEADER, DATA = header_and_data(factors())
FIRST = next(iter(HEADER))
SECONDS = 2.0  # of processor time for one adapter; the largest takes 0.6
NASTY = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "C:\\x",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a\x00b",
    "a\nb",
    "\x1b]0;owned\x07",
    "\u202egnp.exe",
    "\ud800",
    "x" * 400,
    "x" * 100_000,
    "{0}{1}",
    "%s%n",
    "${HOME}",
    "__class__",
    "__proto__",
    "a b",
    ".",
    "..",
    "é",
    "\U0001f600",
    "a.b.",
    ".a",
    "'; DROP TABLE x; --",
)
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    10**4000,
    1e308,
    "text",
    "(a+)+$",
    "\x00\n<b>",
    [],
    [None],
    [[["x"]]],
    {},
    {"a": {"b": []}},
]
VALUES += [["x"] * 5000, {str(i): 4 for i in range(5000)}, "[" * 1000]


def entry(**changed):
    """The header with fields of its first tensor replaced."""
    return {**HEADER, FIRST: {**HEADER[FIRST], **changed}}


def weight_files():
    """(name, the bytes of adapter_model.safetensors)"""
    numbers = random.Random(0)
    for at in [0, 1, 7, 8, 9, 64, len(RAW) - 1, *sorted(numbers.sample(range(len(RAW)), 60))]:
        yield f"cut at {at}", RAW[:at]
    for length in [
        0,
        1,
        2**16,
        2**22,
        2**22 + 1,
        2**31,
        2**32 - 1,
        2**40,
        2**63 - 1,
        2**63,
        2**64 - 1,
        len(RAW),
        len(RAW) - 8,
    ]:
        yield f"header of {length}", assembled(HEADER, DATA, length)
    for at in sorted(numbers.sample(range(len(RAW) - len(DATA)), 60)):
        yield f"flipped at {at}", RAW[:at] + bytes([RAW[at] ^ (1 << numbers.randrange(8))]) + RAW[at + 1 :]
    for kind in [
        "F64",
        "F16",
        "BF16",
        "I8",
        "I64",
        "U8",
        "BOOL",
        "F8_E5M2",
        "F4",
        "C64",
        "f32",
        "",
        "float32",
        5,
        None,
        [],
        {},
    ]:
        yield f"dtype {kind}", assembled(entry(dtype=kind), DATA)
    shapes = [
        [10**9, 10**9],
        [2**62],
        [2**64, 0],
        [0, 2**63],
        [-4, -16],
        [64],
        [4, 16, 1],
        [1] * 500,
        [4.0, 16.0],
        ["4", "16"],
    ]
    for shape in [*shapes, [10**4000], None, {}, "4x16", [None, 64], [[4], [16]], [], [True, 64], [4, -16], [0]]:
        yield f"shape {plain(shape, 30)}", assembled(entry(shape=shape), DATA)
    offsets = [
        [0, 2**63],
        [2**63, 2**63 + 256],
        [-256, 0],
        [256, 0],
        [1, 257],
        [0, 255],
        [0],
        [0, 256, 512],
        [0.0, 256.0],
        None,
    ]
    for pair in [*offsets, [64, 320], ["0", "256"], {}, [None, None], [10**4000, 10**4000 + 256]]:
        yield f"offsets {plain(pair, 30)}", assembled(entry(data_offsets=pair), DATA)
    for value in (None, 5, "x", [], {}, {"dtype": "F32"}, {**HEADER[FIRST], "more": 1}):
        yield f"entry {plain(value, 30)}", assembled({**HEADER, FIRST: value}, DATA)
    for name in NASTY:
        renamed = {name if key == FIRST else key: value for key, value in HEADER.items()}
        yield f"tensor named {plain(name, 20)}", assembled(renamed, DATA)
        module = {key.replace(PATHS[0], name): value for key, value in HEADER.items()}
        yield f"module named {plain(name, 20)}", assembled(module, DATA)
    text = json.dumps(HEADER)[1:-1].encode()
    doubled = b"{" + text + b"," + text + b"}"
    broken = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        doubled,
        text,
        b'{"a":' * 50_000,
        b"[" * 50_000,
        b"\xff\xfe{}",
        b'{"a":NaN}',
        b"{}" * 9,
    ]
    for number, header in enumerate(
        [*broken, b'{"__metadata__": 5}', b'{"__metadata__": {"a": []}}', b"{}", b"\x00" * 500]
    ):
        yield f"header {number}", assembled(header, DATA)
    many = {f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}
    yield "30,000 tensors", assembled(many, b"")
    zip_start, pickled = (
        b"PK\x03\x04" + bytes(200),
        b"\x80\x02cposix\nsystem\nq\x00X\x02\x00\x00\x00idq\x01\x85q\x02Rq\x03.",
    )
    for number, other in enumerate(
        [zip_start, pickled, b"\x80\x05\x95", b"<html>", b"GGUF", b"version https://git-lfs", b"{}", b"\x89PNG"]
    ):
        yield f"disguise {number}", other


def configurations():
    """(name, the bytes of adapter_config.json)"""
    plain_text = json.dumps(config()).encode()
    for at in range(0, len(plain_text), 5):
        yield f"config cut at {at}", plain_text[:at]
    fields = [
        *USED_FIELDS,
        *READ_FIELDS,
        "init_lora_weights",
        "peft_type",
        "base_model_name_or_path",
        "use_dora",
        "unknown",
    ]
    for field in fields:
        for number, value in enumerate(VALUES):
            yield f"{field} = value {number}", json.dumps(config(**{field: value})).encode()
    for name in NASTY:
        yield f"field {plain(name, 20)}", json.dumps(config(**{name: 1})).encode()
        yield f"base {plain(name, 20)}", json.dumps(config(base_model_name_or_path=name)).encode()
        yield f"target {plain(name, 20)}", json.dumps(config(target_modules=name)).encode()
        yield f"pattern {plain(name, 20)}", json.dumps(config(rank_pattern={name: 4})).encode()
    doubled = plain_text[:-1] + b"," + plain_text[1:]
    others = [
        b"",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"r":' * 100_000,
        b'{"r":' + b"9" * 5000 + b"}",
        doubled,
    ]
    for number, text in enumerate(
        [*others, b"{}", b"[]", b"null", b'{"r": NaN}', b" " * 2**21, b"\x80\x02}q\x00.", bytes(100)]
    ):
        yield f"config {number}", text


def tensors():
    """(name, tensors with a fault)"""
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        for kind in (torch.float32, torch.bfloat16, torch.float64):
            yield f"{value} {kind}", {**factors(), FIRST: torch.full((4, 16), value, dtype=kind)}
    for shape in ((0,), (0, 16), (4, 0), (64,), (4, 16, 1), (3, 16), (5, 16), (1, 1), ()):
        yield f"A of shape {shape}", {**factors(), FIRST: torch.ones(shape)}
    yield "zero", {name: torch.zeros_like(tensor) for name, tensor in factors().items()}
    yield "A alone", {name: tensor for name, tensor in factors().items() if "lora_A" in name}
    yield "none", {}
    yield "one head", {f"{PREFIX}head.weight": torch.ones(2, 2)}


def linked(folder: Path, number: int) -> None:
    """One of several folders whose files are links."""
    write(folder)
    secret = folder.parent / "secret"
    secret.write_text("{}")
    name, target = [
        (CONFIG, secret),
        (WEIGHTS, secret),
        (CONFIG, "/dev/zero"),
        (WEIGHTS, "/dev/urandom"),
        (CONFIG, CONFIG),
        (WEIGHTS, "."),
        (CONFIG, "../secret"),
        (WEIGHTS, "/proc/self/mem"),
        (WEIGHTS, "none"),
        (f"{WEIGHTS}.index.json", secret),
        ("other.safetensors", secret),
    ][number]
    (folder / name).unlink(missing_ok=True)
    if "index" in name:
        (folder / WEIGHTS).unlink()
    if "other" in name:
        (folder / WEIGHTS).unlink()
        (folder / CONFIG).unlink()
    (folder / name).symlink_to(target)


CASES = {f"weights: {name}": lambda folder, raw=raw: write_raw(folder, raw) for name, raw in weight_files()}
CASES |= {
    f"config: {name}": lambda folder, raw=raw: (write(folder) / CONFIG).write_bytes(raw)
    for name, raw in configurations()
}
CASES |= {f"tensors: {name}": lambda folder, made=made: write(folder, made) for name, made in tensors()}
CASES |= {f"links: {number}": lambda folder, number=number: linked(folder, number) for number in range(11)}
HUGE = [
    name for name in CASES if "shape" in name or "header of" in name or "offsets" in name or "config: config" in name
]

opened: list[str] = []
watching = False


def _watch(event, arguments):
    if watching and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], (str, Path)):
        opened.append(str(arguments[0]))


sys.addaudithook(_watch)  # hooks stay for the life of the process; `watching` turns this one on and off


def outcome(folder: Path) -> str | None:
    """The sentence with which the folder is refused, None where it is read; any other exception is a fault."""
    global watching
    opened.clear()
    watching = True
    try:
        read_adapter(folder)
        return None
    except R2FError as error:
        return str(error)
    finally:
        watching = False


def tree(folder: Path) -> list[tuple]:
    return sorted((str(path), os.lstat(path).st_size, os.lstat(path).st_mtime_ns) for path in folder.rglob("*"))


def check_sentence(sentence: str, folder: Path) -> None:
    assert sentence.isprintable() and sentence.endswith(".") and len(sentence) < 1200
    assert str(folder) in sentence and len(sentence.split()) >= 5


def test_there_are_enough_of_them():
    assert len(CASES) >= 300


@pytest.mark.parametrize("name", CASES)
def test_read_or_refused_in_one_sentence(name, tmp_path):
    folder = tmp_path / "adapter"
    CASES[name](folder)
    before = tree(tmp_path)
    gc.disable()  # a collection goes through all objects of this process: seconds after thousands of tests
    try:
        start = time.process_time()
        sentence = outcome(folder)
        seconds = time.process_time() - start
    finally:
        gc.enable()
    assert seconds < SECONDS
    assert tree(tmp_path) == before
    assert all(os.path.realpath(path).startswith(str(folder)) for path in opened)
    if sentence is not None:
        check_sentence(sentence, folder)


def test_most_of_them_are_refused(tmp_path):
    """A reader that accepts everything would pass the test above."""
    accepted, some = 0, list(CASES.values())[::5]
    for number, make in enumerate(some):
        make(tmp_path / str(number) / "a")
        accepted += outcome(tmp_path / str(number) / "a") is None
    assert accepted < 0.3 * len(some)


LIMITED = """
import resource, sys
from r2f_ext.errors import R2FError
from r2f_ext.models import read_adapter
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for folder in sys.argv[1:]:
    try:
        read_adapter(folder)
    except R2FError:
        pass
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_huge_claims_take_little_memory(tmp_path):
    """256 MiB of address space beyond what the imports take."""
    for number, name in enumerate(HUGE):
        CASES[name](tmp_path / str(number))
    folders = [str(tmp_path / str(number)) for number in range(len(HUGE))]
    done = subprocess.run([sys.executable, "-c", LIMITED, *folders], capture_output=True, text=True, timeout=300)
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_a_sparse_file_of_a_billion_numbers_is_not_read_into_memory(tmp_path):
    """Header and file agree on 4 GB of zeros that take no space on the disk."""
    numbers = 2**30
    header = assembled({FIRST: {"dtype": "F32", "shape": [4, numbers // 4], "data_offsets": [0, 4 * numbers]}}, b"")
    folder = write_raw(tmp_path / "a", header)
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(len(header) + 4 * numbers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence = outcome(folder)
    assert sentence is not None and "more than the 2,147,483,648 bytes" in sentence
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = st.sampled_from(sorted({*USED_FIELDS, *READ_FIELDS, *HARMLESS_FIELDS, *VARIANTS, "init_lora_weights"}))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "x"]) | JSON,
        "shape": st.lists(st.integers(-1, 40) | st.just(2**40), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 200), min_size=2, max_size=2) | JSON,
    }
)
steady = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def judged(write_files) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        write_files(folder)
        sentence = outcome(folder)
        if sentence is not None:
            check_sentence(sentence, folder)


@steady
@given(st.binary(max_size=200))
def test_any_bytes_as_tensors(raw):
    judged(lambda folder: write_raw(folder, raw))


@steady
@given(
    st.dictionaries(st.text(max_size=30) | st.sampled_from(sorted(HEADER)), ENTRY | JSON, max_size=5),
    st.binary(max_size=200),
)
def test_any_header(header, data):
    judged(lambda folder: write_raw(folder, assembled(header, data)))


@steady
@given(st.dictionaries(FIELDS | st.text(max_size=20), JSON, max_size=6))
def test_any_configuration(fields):
    judged(lambda folder: write(folder, **fields))


@steady
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_configuration(raw):
    judged(lambda folder: (write(folder) / CONFIG).write_bytes(raw))


@steady
@given(st.text(), st.integers(1, 50))
def test_any_text_becomes_one_bounded_line(text, limit):
    shown = plain(text, limit)
    assert shown.isprintable() and len(shown) <= limit + 30 and (len(text) > limit or len(shown) == len(text))
