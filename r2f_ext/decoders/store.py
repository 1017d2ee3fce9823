"""Fitted decoders on disk: decoders.json and one safetensors file per kind.

A ridge decoder in dual form needs its pairs to decode, so decoders.json holds their fingerprint and `load_decoder`
takes the pairs as an argument. Decoders for any A come with any_a.safetensors, the core that their inputs are
expressed in.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from r2f_ext.decoders.agnostic import ANY_A
from r2f_ext.decoders.base import Decoder
from r2f_ext.decoders.core import Core
from r2f_ext.decoders.kinds import KINDS
from r2f_ext.errors import R2FError
from r2f_ext.files import sha256, write_tensors, write_text
from r2f_ext.pairs import PairSource, StoredPairs
from r2f_ext.types import Gradient, Target

SCHEMA = 1
RECORD = "decoders.json"


def save_decoders(folder: Path, states: dict[str, dict[str, Tensor]], pairs: StoredPairs, count: int) -> None:
    """Write fitted decoders; an older decoders.json is removed first, and the new one is written last.

    Args:
        states: kind -> `Decoder.state()`; decoders for any A also need the state of their core, under ANY_A.
        count: number of pairs that the decoders were fitted to.

    Raises:
        R2FError: a file cannot be written.
    """
    (folder / RECORD).unlink(missing_ok=True)
    for kind, state in states.items():
        write_tensors(folder / f"{kind}.safetensors", state)
    record = {
        "schema": SCHEMA,
        "kinds": [kind for kind in states if kind != ANY_A],
        "pairs": pairs.fingerprint,
        "count": count,
        "sha256": {kind: sha256(folder / f"{kind}.safetensors") for kind in states},
    }
    write_text(folder / RECORD, json.dumps(record, indent=2))


def load_decoder(folder: Path, kind: str, pairs: StoredPairs, seen: PairSource | None = None) -> Decoder:
    """Load one decoder.

    Args:
        seen: the `AgnosticPairs` that the decoder was fitted to; None if it was fitted to `pairs` directly.

    Raises:
        R2FError: the folder holds no such decoder, or it was fitted to other pairs.
    """
    decoder = KINDS[kind]()
    decoder.load_state(_read(folder, kind, pairs), pairs if seen is None else seen)
    return decoder


def load_core(folder: Path, pairs: StoredPairs) -> Core:
    """Load the core of decoders for any A; raises as `load_decoder` does."""
    return Core.of_state(_read(folder, ANY_A, pairs), pairs.a)


def _read(folder: Path, name: str, pairs: StoredPairs) -> dict[str, Tensor]:
    try:
        record = json.loads((folder / RECORD).read_text())
        if record["schema"] != SCHEMA:
            raise R2FError(
                f"the decoders in '{folder}' have schema {record['schema']}, this version reads {SCHEMA}: fit again."
            )
        path = folder / f"{name}.safetensors"
        if sha256(path) != record["sha256"][name]:
            raise ValueError(path)
        state = load_file(path, device=str(pairs.target.base.device))
        fingerprint = record["pairs"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise R2FError(f"'{folder}' holds no usable {name} decoder: run r2f fit --out '{folder}'.") from error
    if fingerprint != pairs.fingerprint:
        raise R2FError(f"the decoders in '{folder}' were fitted to other pairs than '{pairs.folder}': fit them again.")
    return state


def read_gradients(path: Path, target: Target, adapters: int) -> Gradient:
    """Read a file written by `r2f decode`: gradients of `adapters` adapters, dense[name] [adapters, d_out, d_in].

    Raises:
        R2FError: missing or damaged file, missing layers, wrong shapes, NaN.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise R2FError(f"'{path}' is missing or not a safetensors file: write it with r2f decode.") from error
    for layer in target.layers:
        tensor = tensors.get(layer.name)
        if tensor is None or tensor.shape != (adapters, layer.d_out, layer.d_in):
            shape = "missing" if tensor is None else tuple(tensor.shape)
            raise R2FError(
                f"'{path}': layer {layer.name} is {shape}, expected ({adapters}, {layer.d_out}, {layer.d_in}): "
                "decode this adapter again."
            )
        if not torch.isfinite(tensor).all():
            raise R2FError(f"'{path}': layer {layer.name} holds NaN or infinity: decode this adapter again.")
    return Gradient({layer.name: tensors[layer.name].to(target.base.device, torch.float32) for layer in target.layers})
