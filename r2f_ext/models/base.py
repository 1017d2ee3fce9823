"""Base models by name or folder: the embedded default, timm's and transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from r2f_ext.errors import R2FError
from r2f_ext.json_file import read_json_file
from r2f_ext.models.embedded import NUM_CLASSES, PIXEL_MEAN, PIXEL_STD, WEIGHTS, build_embedded_vit
from r2f_ext.models.timm_base import shape_of_timm, timm_by_name, timm_folder, timm_random, unfuse_attention
from r2f_ext.models.transformers_base import transformers_by_name, transformers_folder
from r2f_ext.types import BaseModel

KINDS = "'embedded', 'timm:NAME', 'timm-random:NAME', 'transformers:OWNER/NAME', or a folder that exists"


def load_base(spec: str = "embedded", device: str | torch.device = "cpu", num_classes: int | None = None) -> BaseModel:
    """Load a base classifier in eval mode, with frozen float32 parameters and attention that is not fused.

    Weights are read from safetensors files only; no code of a model folder runs.

    Args:
        spec: one of
            `embedded`;
            `timm:NAME`: timm's pretrained weights, from the local Hugging Face cache or else fetched;
            `timm-random:NAME` or `timm-random:NAME:SEED`: the architecture with random weights, without any download;
            `transformers:OWNER/NAME`: an image classifier of transformers, from the same cache or else fetched;
            a folder with `config.json` and `model.safetensors`, as timm's
            `save_for_hf(model, folder, safe_serialization=True)` or transformers' `model.save_pretrained(folder)`
            write it (there also in several files with an index).
        device: where the model lives.
        num_classes: number of classes of the head that an adapter brings; the base gets a head of that size, which
            `attach` fills. None: the base's own head.

    Raises:
        R2FError: unknown name, missing or unreadable weights, a configuration that disagrees with them, not an
            image model.
    """
    with torch.random.fork_rng(devices=[]):  # constructors draw weights before the stored ones replace them
        base = _load(spec, num_classes)
    unfuse_attention(base.model.eval().requires_grad_(False).to(device))
    return base


def _load(spec: str, num_classes: int | None) -> BaseModel:
    if spec == "embedded":
        return _embedded()
    if spec.startswith("timm:"):
        return timm_by_name(spec, num_classes)
    if spec.startswith("timm-random:"):
        return timm_random(spec, num_classes)
    if spec.startswith("transformers:"):
        return transformers_by_name(spec, num_classes)
    return _from_folder(spec, num_classes)


def shape_of(model: torch.nn.Module | str, image_size: int | None = None) -> BaseModel:
    """Describe a base for counting: shapes are all that is needed, so no weights are loaded for a name.

    Args:
        model: a timm model or the name of one.
        image_size: side of the square input in pixels; None: the model's default.

    Returns:
        A base. If only a name was given, its parameters are on the meta device (shapes without values).

    Raises:
        R2FError: timm has no model of that name, or no such size of it; or the model is not one of timm's.
    """
    if model == "embedded":
        return _embedded()
    return shape_of_timm(model, image_size)


def _embedded() -> BaseModel:
    model = build_embedded_vit()
    model.load_state_dict(load_file(WEIGHTS))
    return BaseModel(model, "embedded", (3, 32, 32), PIXEL_MEAN, PIXEL_STD, NUM_CLASSES)


def _from_folder(spec: str, num_classes: int | None) -> BaseModel:
    folder = Path(spec)
    if not folder.is_dir():
        raise R2FError(f"unknown base '{spec}': use {KINDS}.{_meant(spec)}")
    config = _read_config(folder)
    try:
        if "model_type" in config:
            return transformers_folder(folder, spec, num_classes)
        return timm_folder(folder, config, spec, num_classes)
    except RecursionError as error:  # in a value that just could be parsed
        raise R2FError(f"a file of base folder '{spec}' nests too deeply: save the model again.") from error


def _meant(spec: str) -> str:
    """What the user may have meant by a base that is no folder; empty where there is no guess."""
    if Path(spec).is_file():
        return " It is a file: pass the folder that holds it."
    owner, _, name = spec.partition("/")
    return f" A model of the Hugging Face hub is named transformers:{spec} or timm:NAME." if owner and name else ""


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a base folder, a JSON object that names an architecture of timm or a type of transformers."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise R2FError(f"base folder '{folder}' holds an adapter: pass the model that it was trained on.")
        raise R2FError(f"base folder '{folder}' has no config.json: save the model with timm or transformers.")
    config = read_json_file(path, "not readable JSON", "save the model with timm or transformers again")
    if not isinstance(config, dict) or not {"architecture", "model_type"} & config.keys():
        raise R2FError(
            f"{path} names neither an 'architecture' (timm) nor a 'model_type' (transformers): save the model with one."
        )
    return config


def check_classifier(base: BaseModel) -> None:
    """Refuse a base without a classifier where gradients of the cross-entropy are to be taken.

    Raises:
        R2FError: fewer than two classes.
    """
    if base.num_classes == 1:
        raise R2FError(f"base '{base.spec}' has one class, for which cross-entropy is constant: pass its true classes.")
    if base.num_classes < 1:
        raise R2FError(
            f"base '{base.spec}' has no classifier, and no adapter brings one, so its loss is unknown: "
            "pass a base with its classifier, or an adapter that saves its own (modules_to_save)."
        )
