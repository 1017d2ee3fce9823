"""Inputs that several commands read: adapters and images."""

from __future__ import annotations

import argparse

from r2f_ext.audit.inputs import LoadedAdapters, load_adapters
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import print_notes
from r2f_ext.data import ImageSet, load_images
from r2f_ext.types import BaseModel

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
