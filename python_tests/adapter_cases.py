"""Adapter folders written by hand: what PEFT writes in structure, at a size that takes no time."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PATHS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")


def factors(rank: int = 4, d_in: int = 16, d_out: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """A and B of two layers under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in PATHS:
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    return tensors


def config(**fields: Any) -> dict[str, Any]:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["attn.qkv"], "lora_dropout": 0.0}
    return {**plain, **fields}


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    """An adapter folder; `tensors` instead of `factors()`, `fields` over `config()`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config(**fields)))
    save_file(factors() if tensors is None else tensors, folder / WEIGHTS)
    return folder


def header_and_data(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """The parts of a safetensors file: its header as a dictionary, and the tensors' bytes."""
    raw = save(tensors)
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def assembled(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header (an object, or bytes as they are) and data; `length`: what the file claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_raw(folder: Path, weights: bytes, **fields: Any) -> Path:
    """An adapter folder whose tensors file holds these bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config(**fields)))
    (folder / WEIGHTS).write_bytes(weights)
    return folder
