"""Bases of timm: by name from the local cache, with random weights, or from a folder; and how folders are written."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from r2f_ext.errors import R2FError, reason
from r2f_ext.files import write_tensors, write_text
from r2f_ext.models.hub import hub_file
from r2f_ext.types import BaseModel

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
SAVE = "timm.models.save_for_hf(model, folder, safe_serialization=True)"
CFG_FIELDS = {field.name for field in fields(PretrainedCfg)}


def unfuse_attention(model: nn.Module) -> None:
    """Make timm's attention layers of `model` use plain matrix products.

    Gradient matching differentiates the backward pass, and fused attention has no double backward. timm's own switch
    (`set_fused_attn`) is global, so the flag is set on this model's layers only.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def timm_by_name(spec: str, num_classes: int | None) -> BaseModel:
    """`timm:NAME` with timm's pretrained weights.

    Raises:
        R2FError: unknown name, or its safetensors weights are neither cached nor to be fetched.
    """
    name = spec.removeprefix("timm:")
    check_name(name)
    remedy = f"load it where there is a network, save it with {SAVE} and pass that folder as --base"
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        raise R2FError(f"timm has no safetensors weights of '{name}' on the hub: {remedy}.")
    weights = hub_file(cfg.hf_hub_id, safetensors_name(cfg.hf_hub_filename), remedy)
    head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}, **head)
    except Exception as error:  # timm's loaders raise many types of error
        raise R2FError(f"the cached weights of '{name}' cannot be read ({reason(error)}): {remedy}.") from error
    return describe(model, spec)


def safetensors_name(filename: str | None) -> str:
    """The safetensors twin of a weights file on the hub, as timm names it."""
    if filename is None:
        return WEIGHTS
    known = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors", PICKLE: WEIGHTS}
    return known.get(filename, str(Path(filename).with_suffix(".safetensors")))


def timm_random(spec: str, num_classes: int | None) -> BaseModel:
    """`timm-random:NAME[:SEED]`: timm's architecture with the random weights that the seed (0) draws on the CPU.

    Raises:
        R2FError: unknown name, or a seed that is not a whole number from 0.
    """
    name, colon, seed = spec.removeprefix("timm-random:").partition(":")
    check_name(name)
    if colon and not (seed.isascii() and seed.isdigit() and int(seed) < 2**63):
        raise R2FError(f"'{seed}' in '{spec}' is not a seed: use timm-random:NAME or timm-random:NAME:SEED, SEED >= 0.")
    head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    torch.default_generator.manual_seed(int(seed or 0))
    base = describe(timm.create_model(name, pretrained=False, **head), spec)
    note = (
        f"The base is '{name}' with random weights (seed {int(seed or 0)}), not a pretrained model: the figures hold "
        "for an adapter of these very weights only."
    )
    return replace(base, notes=(*base.notes, note))


def timm_folder(folder: Path, config: dict[str, Any], spec: str, num_classes: int | None) -> BaseModel:
    """A folder as timm's `save_for_hf` writes it; also as older versions did, without `model_args`.

    Args:
        config: its config.json.
        num_classes: classes of the head that an adapter brings; None: the folder's own head.

    Raises:
        R2FError: no safetensors weights, or weights that are not those of the configuration.
    """
    path, weights = folder / "config.json", folder / WEIGHTS
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise R2FError(f"{path} names '{architecture}', which timm does not have.")
    if not weights.is_file():
        held = f"holds {PICKLE}, a pickle, which is never opened" if (folder / PICKLE).exists() else f"has no {WEIGHTS}"
        raise R2FError(f"base folder '{spec}' {held}: save it with {SAVE}.")
    cfg, args = _recipe(config, path)
    try:
        model: Any = timm.create_model(architecture, pretrained=False, pretrained_cfg=cfg, **args)
    except Exception as error:  # a damaged config.json makes timm's constructors raise any type
        raise R2FError(
            f"{path} does not describe a '{architecture}' ({reason(error)}): save it with {SAVE}."
        ) from error
    _load_strictly(model, weights, path)
    try:
        _check_size(model, cfg, args, path)
        base = describe(model, spec)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise R2FError(f"{path} has a damaged pretrained_cfg: save it again with {SAVE}.") from error
    if num_classes is None or num_classes == base.num_classes:
        return base
    model.reset_classifier(num_classes)
    return replace(base, num_classes=num_classes)


def _recipe(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(pretrained_cfg, model_args) of a config.json as timm's constructor takes them.

    As in timm, model_args describe the saved weights and take precedence over an older pretrained_cfg that contradicts
    them.
    """
    cfg, args = config.get("pretrained_cfg", config), config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(args, dict):
        raise R2FError(f"{path} has a damaged pretrained_cfg or model_args: save it again with {SAVE}.")
    named = [one["num_classes"] for one in (config, args) if one.get("num_classes") is not None]
    if len(set(map(str, named))) > 1:
        raise R2FError(
            f"{path} says num_classes={named[0]} and, in model_args, {named[1]}: correct it, or save it with {SAVE}."
        )
    cfg = {name: value for name, value in cfg.items() if name in CFG_FIELDS}
    if named:
        cfg["num_classes"] = named[0]
    return cfg, {name: value for name, value in args.items() if name not in ("pretrained", "checkpoint_path")}


def _load_strictly(model: nn.Module, weights: Path, path: Path) -> None:
    """Load the weights; the error names the first tensor that differs, and how."""
    try:
        stored = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise R2FError(f"{weights} is truncated or not a safetensors file: copy or save it again.") from error
    difference = _difference(model.state_dict(), stored)
    if difference is not None:
        raise R2FError(
            f"{weights} does not fit the model that {path} describes (model_args and pretrained_cfg): {difference}; "
            f"save both with {SAVE}."
        )
    model.load_state_dict(stored)


def _difference(own: dict[str, Tensor], stored: dict[str, Tensor]) -> str | None:
    for name, tensor in own.items():
        if name not in stored:
            return f"the file has no {name}"
        if stored[name].shape != tensor.shape:
            return f"{name} is {list(stored[name].shape)} in the file and {list(tensor.shape)} in the model"
    more = sorted(stored.keys() - own.keys())
    return f"the model has no {more[0]}" if more else None


def _check_size(model: Any, cfg: dict[str, Any], args: dict[str, Any], path: Path) -> None:
    """Refuse a pretrained_cfg whose input is not what the weights read."""
    said, embed = cfg.get("input_size"), getattr(model, "patch_embed", None)
    if said is None or not getattr(embed, "strict_img_size", False) or "img_size" in args:
        return
    size = tuple(embed.img_size)  # type: ignore[union-attr]
    if tuple(said[1:]) != size:
        raise R2FError(
            f"pretrained_cfg of {path} gives an input of {said[1]}x{said[2]}, and the weights are of one that reads "
            f"{size[0]}x{size[1]}: correct input_size, or save it with {SAVE}."
        )


def describe(model: Any, spec: str) -> BaseModel:
    """A timm model as a base: input size, channels and pixel statistics from its structure and pretrained_cfg."""
    cfg = model.pretrained_cfg
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or cfg["input_size"][1:]
    channels = _channels(model, cfg)
    mean, std = tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"]))
    notes: tuple[str, ...] = ()
    if not len(mean) == len(std) == channels:
        # timm's own loader does the same, with a warning.
        notes = (
            f"pretrained_cfg gives {len(mean)} pixel means for {channels} channels: their average is used for each.",
        )
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return BaseModel(model, spec, (channels, int(size[0]), int(size[1])), mean, std, model.num_classes, notes)


def _channels(model: Any, cfg: dict[str, Any]) -> int:
    """Channels of the input: the model says so, or else its first convolution."""
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    said = getattr(model, "in_chans", None) or first or cfg["input_size"][0]
    return int(said)


def shape_of_timm(model: nn.Module | str, image_size: int | None) -> BaseModel:
    """A timm model, or the name of one, for counting; see `shape_of`."""
    if isinstance(model, nn.Module):
        kind = type(model).__name__
        if hasattr(model, "pretrained_cfg"):
            return describe(model, kind)
        if not isinstance(model, VisionTransformer):
            raise R2FError(f"a {kind} that timm's create_model did not make: wrap it in a BaseModel.")
        height, width = model.patch_embed.img_size
        plain = (0.5,) * model.in_chans
        return BaseModel(model, kind, (model.in_chans, height, width), plain, plain, model.num_classes)
    name = model.removeprefix("timm:")
    check_name(name)
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        with torch.device("meta"):
            return describe(timm.create_model(name, pretrained=False, **size), f"timm:{name}")
    except Exception as error:  # timm's constructors raise many types of error
        raise R2FError(f"'{name}' cannot be built without weights at that size: {reason(error)}.") from error


def check_name(name: str) -> None:
    """Refuse a name that timm does not have; the error lists close ones."""
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
        hint = f"close ones are {close}" if close else "timm.list_models() lists them"
        raise R2FError(f"unknown base model '{name}': timm has no model of that name; {hint}.")


def save_base(base: BaseModel, folder: Path, architecture: str, model_args: dict[str, Any] | None = None) -> None:
    """Write `base` in timm's folder layout, which `load_base` reads.

    Args:
        architecture: timm's name of the model; model_args: arguments of its constructor that are not the defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": architecture,
        "num_classes": base.num_classes,
        "model_args": model_args or {},
        "pretrained_cfg": {"input_size": base.input_shape, "mean": base.mean, "std": base.std},
    }
    write_text(folder / "config.json", json.dumps(config, indent=2))
    write_tensors(folder / WEIGHTS, base.model.state_dict())
