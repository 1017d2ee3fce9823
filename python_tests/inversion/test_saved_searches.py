"""Kept searches: found again by the same inputs alone, and refused when they are not what was written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import target_of, tiny_base
from safetensors.torch import load_file, save_file

from r2f_ext.inversion import saved_searches as module
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.saved_searches import SavedSearches, SearchFiles, by_victim, files_of

START = torch.full((5,), 0.5)
FOUND = Search(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), 2e-6, 0.1, 9, stopped=True, seconds=1.5, noise=3e-3)
KEYS = ("a" * 64, "b" * 64)


def files(folder: Path) -> SearchFiles:
    return SearchFiles(folder, "gauss_newton", KEYS)


def test_a_search_comes_back_as_it_was(tmp_path):
    files(tmp_path).write(1, FOUND)
    found = files(tmp_path).read(1, START)
    assert torch.equal(found.image, FOUND.image)
    assert replace(found, image=FOUND.image) == FOUND
    assert files(tmp_path).read(0, START) is None


def changed(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"made_for": KEYS[0], "sha256": "0" * 64})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.write_bytes(b""), "unreadable"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "unreadable"),
        (lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n"), "unreadable"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x3e"), "changed since"),
        (lambda path: changed(path, lambda tensors: tensors["image"].fill_(0.5)), "changed since"),
        (lambda path: changed(path, lambda tensors: tensors["image"].fill_(torch.nan)), "changed since"),
        (lambda path: changed(path, lambda tensors: tensors.pop("figures")), "unreadable"),
        (lambda path: changed(path, lambda tensors: tensors.update(image=torch.ones(5).bfloat16())), "another search"),
        (lambda path: changed(path, lambda tensors: tensors.update(image=torch.ones(1 << 20))), "another search"),
        (lambda path: path.write_bytes(path.with_name(path.name.replace("a" * 64, "b" * 64)).read_bytes()), "another"),
        (lambda path: (path.unlink(), path.mkdir()), "not a file"),
    ],
)
def test_what_was_not_written_for_the_search_is_refused(harm, words, tmp_path):
    own = files(tmp_path)
    own.write(0, FOUND)
    own.write(1, FOUND)
    harm(own.path(0))
    with pytest.raises(ValueError, match=words):
        own.read(0, START)
    assert own.read(1, START) is not None


def test_everything_that_decides_a_search_is_in_its_name(tmp_path, monkeypatch):
    base = tiny_base()
    target, other = target_of(base, ("blocks.0.attn.qkv",)), target_of(base, ("blocks.0.attn.qkv",), scale=1.0)
    a, seen, labels = {"l": torch.ones(4, 24)}, {"l": torch.rand(2, 72, 4)}, torch.tensor([1, 2])
    kept = SavedSearches(tmp_path, "proxy")
    plain = files_of(kept, "gauss_newton", "settings", target, a, by_victim(seen), labels).keys
    assert plain == files_of(kept, "gauss_newton", "settings", target, a, by_victim(seen), labels).keys
    variants = [
        files_of(SavedSearches(tmp_path, "other"), "gauss_newton", "settings", target, a, by_victim(seen), labels),
        files_of(kept, "gauss_newton_unrolled", "settings", target, a, by_victim(seen), labels),
        files_of(kept, "gauss_newton", "others", target, a, by_victim(seen), labels),
        files_of(kept, "gauss_newton", "settings", other, a, by_victim(seen), labels),
        files_of(kept, "gauss_newton", "settings", target, {"l": 2 * a["l"]}, by_victim(seen), labels),
        files_of(kept, "gauss_newton", "settings", target, a, by_victim({"l": -seen["l"]}), labels),
        files_of(kept, "gauss_newton", "settings", target, a, by_victim(seen), labels + 1),
    ]
    with torch.no_grad():
        base.model.head.bias.add_(1)
    variants.append(files_of(kept, "gauss_newton", "settings", target, a, by_victim(seen), labels))
    with monkeypatch.context() as other_code:
        other_code.setattr(module, "_code", lambda: "another form of the search")
        variants.append(files_of(kept, "gauss_newton", "settings", target, a, by_victim(seen), labels))
    assert not set(plain) & {key for each in variants for key in each.keys}
    # The other victims of a run play no part.
    last = files_of(kept, "gauss_newton", "settings", target, a, by_victim(seen)[1:], labels[1:])
    assert last.keys == variants[-2].keys[1:]
    assert files_of(None, "gauss_newton", "settings", target, a, by_victim(seen), labels) is None


def test_searches_of_others_are_counted_and_all_are_cleared(tmp_path):
    files(tmp_path).write(0, FOUND)
    SearchFiles(tmp_path, "gauss_newton", ("c" * 64,)).write(0, FOUND)
    SearchFiles(tmp_path, "gauss_newton_unrolled", ("d" * 64,)).write(0, FOUND)
    for name in ("search-mine.safetensors", "report.json"):
        (tmp_path / name).write_text("")
    assert files(tmp_path).unrelated() == 1
    SavedSearches(tmp_path, "").clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "search-mine.safetensors"]
