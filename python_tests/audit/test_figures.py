"""Pictures: pixels as they are, captions that are true, names that hold anything, files that are images."""

import io

import numpy as np
import pytest
import torch
from page_cases import closed_forms, report, victims
from PIL import Image

from r2f_ext.audit.figures import MAX_COLUMNS, Row, png_bytes, rows_of, write_images, write_reconstructions
from r2f_ext.audit.metrics import psnr_db


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(channels):
    image = torch.randint(0, 256, (channels, 6, 7)).float() / 255
    read = np.asarray(Image.open(io.BytesIO(png_bytes(image))))
    assert np.array_equal(read, (image * 255).round().byte().permute(1, 2, 0).numpy().squeeze())


def test_rows_from_top_to_bottom():
    part, figures = victims(3)
    controls = ["mean_image", "class_mean", "nearest_proxy", "shuffled_adapter"]
    controls += ["noise_adapter", "same_label_stranger"]
    assert [row.key for row in rows_of(part, figures)] == ["original", "amortised", "gauss_newton", *controls]
    part, figures = victims(3, private=False)
    assert [row.key for row in rows_of(part, figures)] == ["amortised", "gauss_newton"]


def test_captions_are_the_figures_of_each_picture():
    part, figures = victims(3)
    original, amortised, search, mean, *_ = rows_of(part, figures)
    psnr = psnr_db(part.reconstructions[1].images, part.originals)
    assert [amortised.captions(i) for i in range(3)] == [[(f"{value:.1f} dB", False)] for value in psnr.tolist()]
    assert original.captions(0) == [] and len(mean.captions(2)) == 1
    assert search.captions(0)[1:] == [("✓ exact to 78 dB", True)] and len(search.captions(2)) == 1
    part, figures = victims(1, private=False)
    assert [row.captions(0) for row in rows_of(part, figures)] == [[], [("✓ exact to 78 dB", True)]]


@pytest.mark.parametrize("name", ["plain", "<script>", "cost $_$ and $\\frac$", "a\nb", "n" * 255])
def test_reconstructions_are_drawn_whatever_the_name(tmp_path, name):
    sets = [victims(3, name=name), victims(2, name="other", exact=False)]
    parts, path = [part for part, _ in sets], tmp_path / "r.png"
    write_reconstructions(path, report(sets), parts, closed_forms(parts[0]))
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width > 300 and np.asarray(image.convert("L")).std() > 20
    assert list(tmp_path.iterdir()) == [path]


def drawn_size(tmp_path, count, shape):
    """(width, height) in pixels of one drawn white picture of `count` in a row."""
    path = tmp_path / "a.png"
    write_images(path, [("original", torch.zeros(count, *shape))])
    with Image.open(path) as image:
        black = np.asarray(image.convert("L"))[:, 198:] < 50  # beyond the names
    return int(black.any(0).argmin() - black.any(0).argmax()) or black.shape[1], int(black.any(1).sum())


@pytest.mark.parametrize(("count", "least"), [(1, 128), (4, 128), (16, 70)])
def test_pictures_are_large_and_keep_their_shape(tmp_path, count, least):
    width, height = drawn_size(tmp_path, count, (1, 30, 40))
    assert width >= least and abs(height / width - 0.75) < 0.03


def test_columns_end_somewhere(tmp_path):
    write_images(tmp_path / "a.png", [("original", torch.rand(40, 1, 8, 8)), ("matching", torch.rand(40, 1, 8, 8))])
    sets = [victims(MAX_COLUMNS + 4)]
    write_reconstructions(tmp_path / "b.png", report(sets), [sets[0][0]], [])
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            assert 1300 < image.width < 1700


def test_a_row_without_figures_has_no_captions():
    assert Row("original", torch.zeros(2, 1, 4, 4)).captions(1) == []
