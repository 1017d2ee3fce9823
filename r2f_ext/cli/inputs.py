"""What several commands read: adapters bound to their base, images, and pairs made at the same start."""

from __future__ import annotations

import argparse

import torch

from r2f_ext.audit.inputs import load_adapters
from r2f_ext.cli.device import chosen_device
from r2f_ext.data import ImageSet, load_images
from r2f_ext.errors import R2FError
from r2f_ext.pairs import StoredPairs
from r2f_ext.types import BaseModel, LoraUpdate, Target

Options = argparse.Namespace


def bound_adapters(folders: list[str], options: Options) -> tuple[Target, list[LoraUpdate]]:
    """The adapters in `folders`, attached to --base on --device."""
    return load_adapters(folders, options.base, chosen_device(options))


def images_of(spec: str, base: BaseModel, options: Options, role: str, count: int | None) -> ImageSet:
    """`spec` at the base's input size, by --seed."""
    return load_images(
        spec, input_shape=base.input_shape, num_classes=base.num_classes, count=count, seed=options.seed, role=role
    )


def require_same_a(pairs: StoredPairs, adapter: LoraUpdate) -> None:
    """Raise R2FError where the pairs were not made with this adapter's A."""
    if pairs.own_a:
        raise R2FError(f"each victim of '{pairs.folder}' has its own A: make pairs without --per-victim-a.")
    extra = [name for name in pairs.a if name not in adapter.a]
    if extra:
        raise R2FError(f"the pairs in '{pairs.folder}' were made for another adapter ({extra[0]} too): make new ones.")
    for name, a in adapter.a.items():
        same_shape = name in pairs.a and pairs.a[name].shape == a.shape
        if not same_shape or not torch.allclose(pairs.a[name], a.float(), atol=1e-2):
            raise R2FError(
                f"the pairs in '{pairs.folder}' were made for another adapter (A of {name} differs): make new ones."
            )
