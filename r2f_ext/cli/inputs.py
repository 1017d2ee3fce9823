"""Inputs that several commands read: adapters, images, and pairs made with the same A."""

from __future__ import annotations

import argparse

from r2f_ext.audit.inputs import LoadedAdapters, load_adapters
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import print_notes
from r2f_ext.data import ImageSet, load_images
from r2f_ext.errors import R2FError
from r2f_ext.models import differing_layer
from r2f_ext.pairs import StoredPairs
from r2f_ext.types import BaseModel, LoraUpdate

Options = argparse.Namespace


def read_adapter(options: Options) -> LoadedAdapters:
    """The adapter that is named, attached to --base on --device."""
    loaded = load_adapters([options.adapter], options.base, chosen_device(options))
    print_notes(loaded.target.base.notes)
    return loaded


def images_of(spec: str, base: BaseModel, options: Options, role: str, count: int | None) -> ImageSet:
    """The image set `spec` at the base's input size, by --seed; `role`: "proxy" or "private"."""
    return load_images(
        spec, input_shape=base.input_shape, num_classes=base.num_classes, count=count, seed=options.seed, role=role
    )


def check_same_a(pairs: StoredPairs, adapter: LoraUpdate) -> None:
    """Refuse pairs that were not made with this adapter's A.

    Raises:
        R2FError: the sentence names a layer that differs.
    """
    if pairs.per_victim_a:
        raise R2FError(f"each victim of '{pairs.folder}' has its own A: make pairs without --per-victim-a.")
    name = differing_layer(pairs.a, adapter.start)
    if name is not None:
        raise R2FError(
            f"the pairs in '{pairs.folder}' were made for another adapter (A of {name} differs): make new ones."
        )
