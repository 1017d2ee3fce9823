"""Reads the images of a user's folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from r2f_ext.data.image_set import MAX_BYTES, fit_images
from r2f_ext.errors import R2FError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def list_folder(folder: Path) -> tuple[list[Path], list[int] | None]:
    """Find the images under `folder`, sorted by path, with digits compared as numbers: 2.png before 10.png.

    Hidden files and symbolic links are skipped. If the images are in subfolders, each first-level subfolder is a class;
    classes are numbered in the alphabetical order of their names, as torchvision's ImageFolder does.

    Returns:
        (paths, class of each path), or (paths, None) if the folder has no class subfolders.

    Raises:
        R2FError: no images, or images both beside and inside subfolders.
    """
    found = (path for path in folder.rglob("*") if _is_image(path, folder))
    paths = sorted(found, key=lambda path: [_natural(part) for part in path.relative_to(folder).parts])
    if not paths:
        raise R2FError(f"folder '{folder}' has no images: put {', '.join(SUFFIXES)} files in it.")
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    if "" not in tops:
        names = sorted(set(tops))
        return paths, [names.index(top) for top in tops]
    if any(tops):
        raise R2FError(f"folder '{folder}' has images both beside and inside subfolders: move them all into one kind.")
    return paths, None


def _natural(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """A sort key in which runs of digits compare as numbers."""
    runs = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(False, int(run), "") if run[0] in "0123456789" else (True, 0, run) for run in runs], name


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file() and not path.is_symlink()


def read_images(paths: list[Path], shape: tuple[int, int, int]) -> Tensor:
    """Read `paths` at `shape` (c, h, w), uint8 [len(paths), c, h, w].

    Raises:
        R2FError: a file cannot be read (named), or the result would not fit in 4 GiB.
    """
    if len(paths) * int(np.prod(shape)) > MAX_BYTES:
        raise R2FError(f"{len(paths)} images of shape {shape} need more than 4 GiB: pass a smaller count.")
    out = torch.empty((len(paths), *shape), dtype=torch.uint8)
    for row, path in enumerate(paths):
        out[row] = fit_images(_read(path), shape)[0]
    return out


def _read(path: Path) -> Tensor:
    """One file as uint8 [1, 1 or 3, h, w], rotated according to its EXIF data."""
    try:
        with Image.open(path) as picture:
            pixels = _pixels(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise R2FError(f"image '{path}' cannot be read ({type(error).__name__}): repair or remove it.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _pixels(picture: Image.Image) -> np.ndarray:
    """A picture of any mode as uint8 [h, w, 1 or 3]; transparent parts become black."""
    if picture.mode.startswith(("I;16", "I")):
        wide = np.asarray(picture).astype(np.float64).clip(0, 65535)
        return (wide / 257).round().astype(np.uint8)[..., None]
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no standard range")
    if picture.mode in ("1", "L"):
        return np.array(picture.convert("L"))[..., None]
    if "A" in picture.getbands() or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
    return np.array(picture.convert("RGB"))
