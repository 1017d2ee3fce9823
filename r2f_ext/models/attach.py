"""Binds an adapter to its base: PEFT itself places the factors."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from r2f_ext.errors import R2FError
from r2f_ext.models.adapter_files import PREFIX, AdapterFiles, read_adapter
from r2f_ext.models.converted import split_start
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

    A head saved with the adapter (`modules_to_save`) replaces the base's head. It is the head *after* training, the
    best available estimate of the head at which the victim's gradients were taken.

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
        outcome: Any = set_peft_model_state_dict(wrapped, dict(files.weights))  # it renames the keys in place
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
    model = _with_saved_modules(wrapped, base.model)
    update = LoraUpdate(a, b, stored=storage_dtype([*a.values(), *b.values()]))
    trained, update = split_start(str(files.folder), tuple(layers), update)
    return Target(replace(base, model=model), trained), update


def _reason(error: Exception) -> str:
    """The first line of PEFT's or torch's message."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else " ".join(lines)
    return first[:300].rstrip(".")


def _adapted_layer(name: str, module: LoraLayer) -> AdaptedLayer:
    inner = module.get_base_layer()
    if isinstance(inner, nn.Linear):
        d_in = inner.in_features
    elif isinstance(inner, nn.Conv2d) and _patchifies(inner):
        d_in = inner.in_channels * inner.kernel_size[0] * inner.kernel_size[1]
    else:
        raise R2FError(f"layer {name} is a {type(inner).__name__}: only Linear and patchifying Conv2d are supported.")
    return AdaptedLayer(name, inner.weight.shape[0], d_in, module.r["default"], module.scaling["default"])


def _patchifies(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return plain and conv.kernel_size == conv.stride


def _with_saved_modules(wrapped: nn.Module, model: nn.Module) -> nn.Module:
    saved = {
        path.removeprefix(PREFIX): module.modules_to_save["default"]
        for path, module in wrapped.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    if not saved:
        return model
    model = copy.deepcopy(model)
    for name, module in saved.items():
        model.set_submodule(name, module.requires_grad_(False))
    return model
