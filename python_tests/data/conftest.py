"""A folder of images in three classes."""

import pytest
from image_cases import paint


@pytest.fixture
def classes(tmp_path):
    for index in range(12):
        paint(tmp_path / f"class{index % 3}" / "deep" / f"{index}.png", index)
    return tmp_path
