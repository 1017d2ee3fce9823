"""Pictures: pixels as they are, names that hold anything, files that are images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from r2f_ext.audit.figures import png_bytes, rows_of, write_images, write_reconstructions
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.sets import set_report


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(channels):
    image = torch.randint(0, 256, (channels, 6, 7)).float() / 255
    read = np.asarray(Image.open(io.BytesIO(png_bytes(image, scale=3))))
    assert read.shape[:2] == (18, 21)
    expected = (image * 255).round().byte().permute(1, 2, 0).numpy().squeeze()
    assert np.array_equal(read[::3, ::3], expected) and np.array_equal(read[2::3, 1::3], expected)


def test_rows_from_top_to_bottom(audited):
    part = set_report("x", audited.result, audited.proxy, audited.private)
    keys = [key for key, _ in rows_of(part)]
    assert keys[:4] == ["original", *(found.route for found in reversed(audited.result.reconstructions))]
    assert keys[4:] == ["mean_image", "class_mean", "nearest_proxy", "shuffled_adapter"]
    assert [key for key, _ in rows_of(set_report("x", audited.result, audited.proxy, None))] == keys[1:4]


@pytest.mark.parametrize("name", ["plain", "<script>", "cost $_$ and $\\frac$", "a\nb"])
def test_reconstructions_are_drawn_whatever_the_name(audited, tmp_path, name):
    part = set_report(name, audited.result, audited.proxy, audited.private)
    path = tmp_path / "r.png"
    write_reconstructions(path, [part], [Phase0Report("patch_position", 99.0, 98.0, 0.1, "test.", part.originals)])
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width > 300 and np.asarray(image.convert("L")).std() > 20
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_of_images(tmp_path):
    write_images(tmp_path / "a.png", [("original", torch.rand(40, 1, 8, 8)), ("matching", torch.rand(40, 1, 8, 8))])
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 2 * image.height
