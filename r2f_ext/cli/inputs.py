"""What several commands read: adapters on their base, and images."""

from __future__ import annotations

import argparse

from r2f_ext.cli.device import chosen_device
from r2f_ext.data import ImageSet, load_images
from r2f_ext.errors import R2FError
from r2f_ext.models import attach, differing_layer, load_base, read_adapter
from r2f_ext.pairs import StoredPairs
from r2f_ext.types import BaseModel, LoraUpdate, Target


def read_adapters(folders: list[str], options: argparse.Namespace) -> tuple[Target, list[LoraUpdate]]:
    """The adapters in `folders`, on the base that --base names."""
    files = [read_adapter(folder) for folder in folders]
    base = load_base(options.base, chosen_device(options), files[0].num_classes)
    bound = [attach(file, base) for file in files]
    return bound[0][0], [update for _, update in bound]


def images_of(spec: str, base: BaseModel, options: argparse.Namespace, role: str, count: int | None) -> ImageSet:
    """The image set `spec` as the base reads it; `role`: "proxy" or "private"."""
    return load_images(
        spec, input_shape=base.input_shape, num_classes=base.num_classes, count=count, seed=options.seed, role=role
    )


def check_same_a(pairs: StoredPairs, adapter: LoraUpdate) -> None:
    """Refuse pairs that were not made with this adapter's A.

    Raises:
        R2FError: the sentence names a layer that differs.
    """
    if pairs.own_a:
        raise R2FError(f"each victim of '{pairs.folder}' has its own A: make pairs without --own-a.")
    name = differing_layer(pairs.a, adapter.a)
    if name is not None:
        raise R2FError(
            f"the pairs in '{pairs.folder}' were made for another adapter (A of {name} differs): make new ones."
        )
