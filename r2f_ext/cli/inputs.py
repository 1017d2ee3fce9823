"""What several commands read: adapters bound to their base, images, and pairs made at the same start."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from r2f_ext.audit.inputs import load_adapters
from r2f_ext.cli.device import chosen_device
from r2f_ext.data import ImageSet, load_images
from r2f_ext.errors import R2FError
from r2f_ext.pairs import StoredPairs
from r2f_ext.types import BaseModel, LoraUpdate, Target

Options = argparse.Namespace
SAME_A = 1e-2  # how far the A of one start may lie apart after a small training, a share of its largest entry


def read_adapters(folders: list[str], options: Options) -> tuple[Target, list[LoraUpdate]]:
    """The adapters in `folders`, attached to --base on --device."""
    return load_adapters(folders, options.base, chosen_device(options))


def images_of(spec: str, base: BaseModel, options: Options, role: str, count: int | None) -> ImageSet:
    """`spec` at the base's input size, by --seed."""
    return load_images(
        spec, input_shape=base.input_shape, num_classes=base.num_classes, count=count, seed=options.seed, role=role
    )


def check_same_a(pairs: StoredPairs, adapter: LoraUpdate) -> None:
    """Refuse pairs that were not made with this adapter's A.

    Raises:
        R2FError: the sentence names a layer that differs.
    """
    if pairs.own_a:
        raise R2FError(f"each victim of '{pairs.folder}' has its own A: make pairs without --per-victim-a.")
    for name in sorted(pairs.a.keys() | adapter.a.keys()):
        if name not in pairs.a or name not in adapter.a or not _same_a(pairs.a[name], adapter.a[name].float()):
            raise R2FError(
                f"the pairs in '{pairs.folder}' were made for another adapter (A of {name} differs): make new ones."
            )


def _same_a(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=SAME_A * float(one.abs().max()))
