"""Inputs of an audit: adapters that share one target, and private images in the adapters' order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2f_ext.audit.assign import assign
from r2f_ext.data import ImageSet, load_images
from r2f_ext.errors import R2FError
from r2f_ext.models import AdapterFacts, AdapterFiles, attach, load_base, read_adapter
from r2f_ext.types import BaseModel, LoraUpdate, Target


@dataclass(frozen=True)
class LoadedAdapters:
    """V adapters of one base.

    Attributes:
        target: base and adapted layers, the same for all.
        updates: their factors; facts: what their folders say beside them, in the same order.
    """

    target: Target
    updates: list[LoraUpdate]
    facts: tuple[AdapterFacts, ...]


def load_adapters(folders: Sequence[str | Path], base: str | BaseModel, device: str = "cpu") -> LoadedAdapters:
    """Read adapters as PEFT saves them and attach them to one base.

    Args:
        base: as `load_base` takes it, or a loaded one.
        device: of a base that is loaded here.

    Raises:
        R2FError: an adapter cannot be read or does not fit the base, or the adapters differ in layers, rank, scale or
            in a module saved with them (a trained head).
    """
    files = [read_adapter(folder) for folder in folders]
    loaded = base if isinstance(base, BaseModel) else load_base(base, device, files[0].num_classes)
    bound = [attach(one, loaded) for one in files]
    for one, (target, _) in zip(files[1:], bound[1:], strict=True):
        difference = _difference(bound[0][0], target) or _other_head(files[0], one)
        if difference is not None:
            raise R2FError(f"'{files[0].folder}' and '{one.folder}' {difference}: audit them one by one.")
    return LoadedAdapters(bound[0][0], [update for _, update in bound], tuple(one.facts for one in files))


def _difference(first: Target, second: Target) -> str | None:
    """How the layers of two adapters differ, as a clause; None if they do not."""
    if set(first.names) != set(second.names):
        name = sorted(set(first.names) ^ set(second.names))[0]
        return f"do not adapt the same layers ({name} differs)"
    for one in first.layers:
        other = second.layer(one.name)
        for what in ("rank", "scale"):
            if getattr(one, what) != getattr(other, what):
                return f"differ in the {what} of {one.name} ({getattr(one, what):g} and {getattr(other, what):g})"
    return None


def _other_head(first: AdapterFiles, second: AdapterFiles) -> str | None:
    """The first tensor other than the LoRA factors that differs, as a clause; None if there is none."""
    one, other = first.saved, second.saved
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or not torch.equal(one[name], other[name]):
            return f"differ in the saved module {name}"
    return None


def load_private(spec: str, base: BaseModel, seed: int, adapters: int) -> ImageSet:
    """Private images by `spec`: as `load_images` takes it, or `DATA:INDEX` for one image of it.

    Raises:
        R2FError: no such images, an index beyond them, or fewer images than adapters.
    """
    name, _, index = spec.rpartition(":")
    single = bool(name) and index.isdigit()
    images = load_images(
        name if single else spec,
        input_shape=base.input_shape,
        num_classes=base.num_classes,
        seed=seed,
        role="private",
    )
    if single:
        if int(index) >= len(images):
            raise R2FError(f"--private {spec}: '{name}' has {len(images)} images, counted from 0.")
        images = replace(images.take(torch.tensor([int(index)])), name=spec)
    if len(images) < adapters:
        raise R2FError(f"--private gives {len(images)} images for {adapters} adapters: give one for each.")
    return images


def pair_up(private: ImageSet, images: Tensor) -> ImageSet:
    """Private images in the order of the V adapters whose reconstructions are `images` [V, c, h, w].

    Where there are V private images, their order is kept; where there are more, the best match by PSNR is taken, and
    the set's notes say so.
    """
    if len(private) == len(images):
        return private
    return private.take(assign(images.cpu(), private.batch(slice(None)))).noted(
        f"{len(private)} private images for {len(images)} adapters: each adapter is scored against its best match, "
        "which flatters it; name the true image with --private DATA:INDEX."
    )
