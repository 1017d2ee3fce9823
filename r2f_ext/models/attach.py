"""Binds an adapter to its base: PEFT itself places the factors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.models.adapter_files import PREFIX, AdapterFiles, read_adapter
from r2f_ext.models.converted import split_start
from r2f_ext.models.saved_modules import compare_saved, input_width, with_saved_modules
from r2f_ext.models.storage import storage_dtype
from r2f_ext.types import AdaptedLayer, BaseModel, LoraUpdate, Target


def load_adapter(folder: str | Path, base: BaseModel) -> tuple[Target, LoraUpdate]:
    """Read a PEFT LoRA folder and bind it to its base: `read_adapter`, then `attach`.

    Args:
        folder: as PEFT's `save_pretrained` writes it.
        base: the model that the adapter was trained on.

    Returns:
        (target, update): the adapted layers, and their factors A [r, d_in] and B [d_out, r] by name.

    Raises:
        R2FError: a file is missing or broken, the adapter is not plain LoRA, or it does not fit the base.
    """
    return attach(read_adapter(folder), base)


def attach(files: AdapterFiles, base: BaseModel) -> tuple[Target, LoraUpdate]:
    """Bind an adapter to its base: which layers it changes, with which factors and scale.

    Whole parameters saved with the adapter become layers of their own where they began at the base's values. Otherwise
    they replace the base's: trained as they are, they are the best estimate of where the victim's gradients were taken.

    Returns:
        (target, update); factors are float32 (float64 stays float64) on the base's device. Where the file holds the
        start of its factors, they are split, see `split_start`.

    Raises:
        R2FError: the adapter names layers or shapes that the base does not have, or wraps a kind of layer
            other than Linear and patchifying Conv2d.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws factors before the stored ones replace them
            wrapped = get_peft_model(copy.deepcopy(base.model), LoraConfig(**files.config))
        own = get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # with the modules that PEFT would save
        outcome: Any = set_peft_model_state_dict(wrapped, own | files.weights)
    except Exception as error:  # PEFT checks nothing itself, so a damaged config raises any type of error
        raise R2FError(
            f"adapter '{files.folder}' does not fit base '{base.spec}': {_reason(error)}; name its own base."
        ) from error
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if outcome.unexpected_keys or missing:
        name = (list(outcome.unexpected_keys) + missing)[0]
        raise R2FError(
            f"adapter '{files.folder}' does not fit base '{base.spec}': no match for {name}; name its own base."
        )

    layers: list[AdaptedLayer] = []
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for path, module in wrapped.named_modules():
        name = path.removeprefix(PREFIX)
        if isinstance(module, LoraLayer):
            layer = _adapted_layer(name, module)
            layers.append(layer)
            dtype = torch.promote_types(files.weights[f"{PREFIX}{name}.lora_A.weight"].dtype, torch.float32)
            a[name] = files.weights[f"{PREFIX}{name}.lora_A.weight"].to(base.device, dtype).flatten(1)
            b[name] = files.weights[f"{PREFIX}{name}.lora_B.weight"].to(base.device, dtype).flatten(1)
    update = LoraUpdate(a, b, stored=storage_dtype([*a.values(), *b.values()]))
    trained, update = split_start(str(files.folder), tuple(layers), update)
    return with_saved_modules(Target(base, trained), update, compare_saved(files, base))


def _reason(error: Exception) -> str:
    """The first line of PEFT's or torch's message."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else " ".join(lines)
    return first[:300].rstrip(".")


def _adapted_layer(name: str, module: LoraLayer) -> AdaptedLayer:
    inner = module.get_base_layer()
    d_in = input_width(inner)
    if d_in is None:
        raise R2FError(f"layer {name} is a {type(inner).__name__}: only Linear and patchifying Conv2d are supported.")
    return AdaptedLayer(name, inner.weight.shape[0], d_in, module.r["default"], module.scaling["default"])
