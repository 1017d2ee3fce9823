"""Base models: the embedded default, timm by name, or a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.files import write_tensors, write_text
from r2f_ext.models.embedded import NUM_CLASSES, PIXEL_MEAN, PIXEL_STD, WEIGHTS, build_embedded_vit
from r2f_ext.types import BaseModel


def load_base(spec: str = "embedded", device: str | torch.device = "cpu", num_classes: int | None = None) -> BaseModel:
    """Load a base classifier in eval mode, with frozen parameters and attention that is not fused.

    Args:
        spec: `embedded`; `timm:NAME` (timm's pretrained weights where they are cached or can be fetched);
            or a folder with timm's `config.json` (`architecture`, `num_classes`, `pretrained_cfg`) and
            `model.safetensors`, as timm's own `save_for_hf` writes it.
        device: where the model lives.
        num_classes: number of classes for `timm:NAME`, where an adapter brings its own head.

    Raises:
        R2FError: unknown name, missing or unreadable weights, not an image classifier.
    """
    with torch.random.fork_rng(devices=[]):  # timm draws weights before the stored ones replace them
        if spec == "embedded":
            base = _embedded()
        elif spec.startswith("timm:"):
            base = _from_timm(spec, num_classes)
        else:
            base = _from_folder(spec)
    unfuse_attention(base.model.eval().requires_grad_(False).to(device))
    return base


def unfuse_attention(model: nn.Module) -> None:
    """Make timm's attention layers of `model` use plain matrix products.

    Gradient matching differentiates the backward pass, and fused attention has no double backward. timm's own switch
    (`set_fused_attn`) is global, so the flag is set on this model's layers only.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def shape_of(model: nn.Module | str, image_size: int | None = None) -> BaseModel:
    """Describe a base for counting: shapes are all that is needed, so no weights are loaded for a name.

    Args:
        model: a timm model or the name of one.
        image_size: side of the square input in pixels; None: the model's default.

    Returns:
        A base. If only a name was given, its parameters are on the meta device (shapes without values).

    Raises:
        R2FError: timm has no model of that name, or no such size of it; or the model is not one of timm's.
    """
    if isinstance(model, nn.Module):
        kind = type(model).__name__
        if hasattr(model, "pretrained_cfg"):
            return _describe(model, kind)
        if not isinstance(model, VisionTransformer):
            raise R2FError(f"a {kind} that timm's create_model did not make: wrap it in a BaseModel.")
        height, width = model.patch_embed.img_size
        plain = (0.5,) * model.in_chans
        return BaseModel(model, kind, (model.in_chans, height, width), plain, plain, model.num_classes)
    name = model.removeprefix("timm:")
    if name == "embedded":
        return _embedded()
    _check_name(name)
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        with torch.device("meta"):
            return _describe(timm.create_model(name, pretrained=False, **size), f"timm:{name}")
    except Exception as error:  # timm's constructors raise many types of error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise R2FError(f"'{name}' cannot be built without weights at that size: {reason}") from error


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3]) or "see timm.list_models()"
        raise R2FError(f"unknown base model '{name}': timm has no model of that name (close: {close}).")


def _embedded() -> BaseModel:
    model = build_embedded_vit()
    model.load_state_dict(load_file(WEIGHTS))
    return BaseModel(model, "embedded", (3, 32, 32), PIXEL_MEAN, PIXEL_STD, NUM_CLASSES)


def _from_timm(spec: str, num_classes: int | None) -> BaseModel:
    name = spec.removeprefix("timm:")
    _check_name(name)
    head: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model = timm.create_model(name, pretrained=True, **head)
    except Exception as error:  # hub, network and safetensors errors differ by version
        raise R2FError(
            f"the pretrained weights of '{name}' could not be loaded ({type(error).__name__}): "
            f"save them with timm's save_for_hf and pass that folder as --base."
        ) from error
    return _describe(model, spec)


def _from_folder(spec: str) -> BaseModel:
    folder = Path(spec)
    if not folder.is_dir():
        raise R2FError(f"unknown base '{spec}': use 'embedded', 'timm:NAME', or a folder that exists.")
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise R2FError(f"base folder '{spec}' has no {path.name}: save it with timm's save_for_hf.")
    try:
        config = json.loads(config_path.read_text())
        architecture = config["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise R2FError(f"{config_path} is not a timm config (JSON with 'architecture').") from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise R2FError(f"{config_path} names '{architecture}', which timm does not have.")
    try:
        model: Any = timm.create_model(
            architecture,
            pretrained=False,
            num_classes=config.get("num_classes", 1000),
            **config.get("model_args", {}),
        )
        model.load_state_dict(load_file(weights_path))
    except Exception as error:  # a damaged config.json makes timm's constructors raise any type
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise R2FError(f"{weights_path} does not fit '{architecture}' as {config_path} has it: {reason}") from error
    try:
        cfg = config.get("pretrained_cfg") or {}
        model.pretrained_cfg.update({key: tuple(cfg[key]) for key in ("mean", "std", "input_size") if key in cfg})
        return _describe(model, spec)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise R2FError(f"{config_path} has a damaged pretrained_cfg: save it again with timm's save_for_hf.") from error


def _describe(model: Any, spec: str) -> BaseModel:
    cfg = model.pretrained_cfg
    size = model.patch_embed.img_size if hasattr(model, "patch_embed") else cfg["input_size"][1:]
    channels = cfg.get("input_size", (3,))[0]
    shape = (channels, int(size[0]), int(size[1]))
    return BaseModel(model, spec, shape, tuple(cfg["mean"]), tuple(cfg["std"]), model.num_classes)


def save_base(base: BaseModel, folder: Path, architecture: str, model_args: dict | None = None) -> None:
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
    write_tensors(folder / "model.safetensors", base.model.state_dict())
