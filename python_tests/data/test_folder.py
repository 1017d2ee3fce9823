"""Folders of image files: every format, classes by subfolder, files that cannot be read."""

import numpy as np
import pytest
import torch
from image_cases import check, paint
from PIL import Image
from torchvision import datasets

from r2f_ext.data import content_hashes, load_images
from r2f_ext.data.folder import list_folder
from r2f_ext.errors import R2FError


def test_folder_with_classes(classes):
    loaded = load_images(str(classes))
    check(loaded, 12)
    assert loaded.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert load_images(str(classes), num_classes=2).labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4
    drawn = load_images(str(classes), count=6, seed=1)
    assert len(drawn) == 6 and set(content_hashes(drawn.images)) < set(content_hashes(loaded.images))
    first = load_images(str(classes), count=6, role="private")
    assert torch.equal(first.images, loaded.images[:6])


def test_flat_folder_of_every_format(tmp_path):
    for index, suffix in enumerate(("png", "jpg", "webp", "bmp", "tif", "JPEG")):
        paint(tmp_path / f"{index}.{suffix}", index)
    for index, mode in enumerate(("L", "1", "P", "RGBA", "LA")):
        paint(tmp_path / f"mode{index}.png", index, mode=mode)
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / "wide.png")  # the last by name
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    (tmp_path / "link.png").symlink_to(tmp_path / "0.png")
    loaded = load_images(str(tmp_path), seed=4)
    check(loaded, 12)
    assert loaded.images[-1].min() == 255
    assert "random" in loaded.notes[0] and not loaded.labels_known


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(tmp_path, content):
    good = paint(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes(good.read_bytes()[:300] if content is None else content)
    with pytest.raises(R2FError, match=r"torn\.png' cannot be read"):
        load_images(str(tmp_path))


def test_folder_errors(tmp_path):
    with pytest.raises(R2FError, match="has no images"):
        load_images(str(tmp_path))
    paint(tmp_path / "one.png")
    with pytest.raises(R2FError, match="a proxy needs at least 2 images"):
        load_images(str(tmp_path))
    assert len(load_images(str(tmp_path), role="private")) == 1
    paint(tmp_path / "sub" / "two.png")
    with pytest.raises(R2FError, match="both beside and inside"):
        load_images(str(tmp_path))


def test_numbers_in_names_count_as_numbers(tmp_path):
    names = ["10.png", "2.png", "1.png", "b10.png", "b9.png", "b9a.png", "02.png", "\u00b2.png"]
    for index, name in enumerate(names):
        paint(tmp_path / name, index)
    found = [path.name for path in list_folder(tmp_path)[0]]
    assert found == ["1.png", "02.png", "2.png", "10.png", "b9.png", "b9a.png", "b10.png", "\u00b2.png"]


def test_classes_keep_the_numbers_that_torchvision_gives(tmp_path):
    for name in ("10", "9", "1"):
        paint(tmp_path / name / "a.png")
    paths, classes = list_folder(tmp_path)
    expected = datasets.ImageFolder(str(tmp_path)).class_to_idx
    assert [expected[path.parent.name] for path in paths] == classes
