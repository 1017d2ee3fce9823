"""Inputs of an audit: adapters that share one target, and private images in the adapters' order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2f_ext.audit.assign import assign
from r2f_ext.audit.record import split_private
from r2f_ext.data import ImageSet, images_for
from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import PATCH_WEIGHT, POSITIONS
from r2f_ext.models import (
    AdapterFacts,
    attach,
    compare_saved,
    load_base,
    note_on_base,
    read_adapter,
    with_saved_facts,
)
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
        R2FError: an adapter cannot be read or does not fit the base, or the adapters differ in what one target holds
            for all: layers, rank, scale, stored precision, or a trained module that stands in for an unknown start.
    """
    files = [read_adapter(folder) for folder in folders]
    loaded = base if isinstance(base, BaseModel) else load_base(base, device, files[0].num_classes)
    bound = [attach(one, loaded) for one in files]
    saved = [compare_saved(one, loaded) for one in files]
    for i in range(1, len(files)):
        difference = (
            _other_layers(bound[0][0], bound[i][0])
            or _other_precision(bound[0][1], bound[i][1])
            or _other_stand_in(saved[0].stand_ins, saved[i].stand_ins)
        )
        if difference is not None:
            raise R2FError(f"'{files[0].folder}' and '{files[i].folder}' {difference}: audit them one by one.")
    facts = tuple(
        with_saved_facts(
            replace(one.facts, notes=one.facts.notes + note_on_base(one, loaded)),
            replace(own, leaks=own.leaks + _closed_form(own.gradients)),
        )
        for one, own in zip(files, saved, strict=True)
    )
    return LoadedAdapters(bound[0][0], [update for _, update in bound], facts)


def _closed_form(gradients: Collection[str]) -> tuple[str, ...]:
    """That the named gradients include those that the route patch_position reads, as a sentence."""
    if not {PATCH_WEIGHT, POSITIONS} <= set(gradients):
        return ()
    return (
        "The changes of the patch embedding and of the position embedding place the patches: for an adapter of one "
        "image that plain SGD trained, the route patch_position solves for them in closed form.",
    )


def _other_layers(first: Target, second: Target) -> str | None:
    """How the layers of two adapters differ, as a clause; None if they do not."""
    if set(first.names) != set(second.names):
        name = sorted(set(first.names) ^ set(second.names))[0]
        layer = (first if name in first.names else second).layer(name)
        if layer.saved:
            return f"differ in the saved module {name}, which only one of them holds trained"
        return f"do not adapt the same layers ({name} differs)"
    for one in first.layers:
        other = second.layer(one.name)
        if one.saved != other.saved:
            return f"differ in the saved module {one.name}, which only one of them holds trained"
        for what in ("rank", "scale"):
            if getattr(one, what) != getattr(other, what):
                return f"differ in the {what} of {one.name} ({getattr(one, what):g} and {getattr(other, what):g})"
    return None


def _other_precision(first: LoraUpdate, second: LoraUpdate) -> str | None:
    """How the stored precision of two adapters differs, as a clause; None if it does not. Their A are averaged."""
    if first.stored == second.stored:
        return None
    return f"differ in stored precision ({first.stored} and {second.stored})".replace("torch.", "")


def _other_stand_in(first: dict[str, Tensor], second: dict[str, Tensor]) -> str | None:
    """The first parameter of unknown start that differs, as a clause; None if there is none."""
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second or not torch.equal(first[name], second[name]):
            return f"differ in {name}, whose start the base does not hold"
    return None


def load_private(spec: str, base: BaseModel, seed: int, adapters: int) -> ImageSet:
    """Private images: a `spec` of `load_images`, or `DATA:INDEX,...` for one image of it per adapter, in their order.

    Raises:
        R2FError: no such images, an index beyond them, another number of indices than adapters, or fewer images.
    """
    name, rows = split_private(spec)
    images = images_for(base, name, seed=seed, role="private")
    if rows is not None:
        if max(rows) >= len(images):
            raise R2FError(f"--private {spec}: '{name}' has {len(images)} images, counted from 0.")
        if len(rows) != adapters:
            raise R2FError(
                f"--private {spec} names {len(rows)} images for {adapters} adapters: name one for each, in their order."
            )
        return replace(images.take(torch.tensor(rows)), name=spec, in_order=True)
    if len(images) < adapters:
        raise R2FError(f"--private gives {len(images)} images for {adapters} adapters: give one for each.")
    return images


@dataclass(frozen=True)
class Pairing:
    """The true images of V adapters.

    Attributes:
        originals: V private images, in the order of the adapters.
        matched: the reconstructions decided which image is whose. That flatters them, so a control is compared fairly
            only after its reconstructions were matched to the private images in the same way (`assign`).
        sentence: how adapters and images were paired, for the report.
    """

    originals: ImageSet
    matched: bool
    sentence: str


def pair_up(private: ImageSet, images: Tensor) -> Pairing:
    """Pair V adapters, whose reconstructions are `images` [V, c, h, w], with at least V private images.

    An order that the user named is kept. Otherwise reconstructions are assigned to images by the best sum of PSNR,
    because the order of files need not be that of adapters.
    """
    victims = len(images)
    if private.in_order:
        return Pairing(private, False, "The private images are those named for the adapters, one by one.")
    if len(private) == victims == 1:
        return Pairing(private, False, "One adapter is scored against the one private image.")
    rows = assign(images.cpu(), private.batch(slice(None)))
    remedy = "this flatters the scores; name the true images with --private DATA:INDEX,... in the adapters' order."
    if len(private) > victims:
        whose = "adapter was" if victims == 1 else f"of {victims} adapters was"
        how = f"Each {whose} matched to the one of {len(private)} private images that fits its reconstruction best"
    elif torch.equal(rows, torch.arange(victims)):
        how = "The reconstructions were matched to the private images, which left both in the given order"
    else:
        how = "The reconstructions were matched to the private images, which changed their order"
    return Pairing(private.take(rows), True, f"{how}: {remedy}")
