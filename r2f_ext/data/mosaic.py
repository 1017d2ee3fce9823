"""Small gray images in one PNG file: a mosaic of tiles, with the labels in a text chunk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.files import write_atomically

_LABELS, _TILE = "labels", "tile"


def write_mosaic(path: Path, images: Tensor, labels: Tensor) -> None:
    """Write images uint8 [n, h, w] and labels [n] (0 to 9) to `path`, atomically and reproducibly.

    Raises:
        ValueError: the tensors do not fit together, or a label is not a single digit.
    """
    if images.dtype != torch.uint8 or images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError("a mosaic holds images uint8 [n, h, w] with labels [n], n > 0")
    if int(labels.min()) < 0 or int(labels.max()) > 9:
        raise ValueError("a mosaic's labels are single digits")
    count, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = torch.zeros(rows * columns, height, width, dtype=torch.uint8)
    tiles[:count] = images
    sheet = tiles.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
    info = PngImagePlugin.PngInfo()
    info.add_text(_TILE, f"{height}x{width}")
    info.add_text(_LABELS, "".join(map(str, labels.tolist())), zip=True)
    picture = Image.fromarray(sheet.numpy())
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG", optimize=True, pnginfo=info))


def read_mosaic(path: Path) -> tuple[Tensor, Tensor]:
    """Return (images uint8 [n, h, w], labels int64 [n]) as `write_mosaic` wrote them.

    Raises:
        R2FError: the file is missing, damaged or not a mosaic.
    """
    try:
        with Image.open(path) as picture:
            sheet = np.array(picture)
            text = picture.text  # type: ignore[attr-defined]
        height, width = (int(side) for side in text[_TILE].split("x"))
        labels = torch.tensor([int(digit) for digit in text[_LABELS]], dtype=torch.int64)
        rows, columns = sheet.shape[0] // height, sheet.shape[1] // width
        tiles = torch.from_numpy(sheet).view(rows, height, columns, width).transpose(1, 2)
        images = tiles.reshape(-1, height, width)[: len(labels)].contiguous()
    except (OSError, SyntaxError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise R2FError(f"{path} is not a readable image mosaic: reinstall r2f_ext or run build_assets.py.") from error
    if len(images) != len(labels):
        raise R2FError(f"{path} holds fewer tiles than labels: reinstall r2f_ext or run build_assets.py.")
    return images, labels
