"""Many small images in one file."""

import pytest
import torch
from image_cases import paint

from r2f_ext.data.mosaic import read_mosaic, write_mosaic
from r2f_ext.errors import R2FError


def test_mosaic_round_trip(tmp_path):
    images, labels = torch.randint(0, 256, (11, 7, 5), dtype=torch.uint8), torch.arange(11) % 10
    write_mosaic(tmp_path / "a.png", images, labels)
    write_mosaic(tmp_path / "b.png", images, labels)
    read, digits = read_mosaic(tmp_path / "a.png")
    assert torch.equal(read, images) and torch.equal(digits, labels)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="digits"):
        write_mosaic(tmp_path / "c.png", images, labels + 10)


def test_damaged_mosaic(tmp_path):
    for name, content in (("empty.png", b""), ("text.png", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(R2FError, match=name):
            read_mosaic(tmp_path / name)
    paint(tmp_path / "plain.png")
    with pytest.raises(R2FError, match="not a readable image mosaic"):
        read_mosaic(tmp_path / "plain.png")
