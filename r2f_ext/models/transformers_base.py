"""Bases of transformers: its image classifiers, from a folder or the local cache; no remote code, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import logging

from r2f_ext.errors import R2FError, reason
from r2f_ext.models.hub import hub_folder
from r2f_ext.models.saved_head import HEADS
from r2f_ext.types import BaseModel

PREPROCESSOR = "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAVE = "model.save_pretrained(folder)"
FETCHED = ("config.json", PREPROCESSOR, "model*.safetensors", INDEX)
# Pixel statistics that the published models of a type were trained with, where no preprocessor_config.json says.
STATISTICS = {
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)),
    **dict.fromkeys(("clip", "clip_vision_model"), (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)),
}


@dataclass(frozen=True)
class Pixels:
    """How images become inputs: (height, width) or None, mean and std per channel for pixels in [0, 1]; and a note."""

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str | None = None


def transformers_by_name(spec: str, num_classes: int | None) -> BaseModel:
    """`transformers:OWNER/NAME`, from the local Hugging Face cache or else fetched; only JSON and safetensors.

    Raises:
        R2FError: neither cached nor to be fetched; or as `transformers_folder`.
    """
    name = spec.removeprefix("transformers:")
    remedy = f"load it where there is a network, save it with {SAVE} and pass that folder as --base"
    return transformers_folder(hub_folder(name, FETCHED, remedy), spec, num_classes)


def transformers_folder(folder: Path, spec: str, num_classes: int | None) -> BaseModel:
    """A folder as transformers' `save_pretrained` writes it, of any image classifier of the installed version.

    A type without an image classifier (a bare DINOv3), and a model saved without its head, have num_classes 0 unless
    the adapter brings a head that fits.

    Args:
        spec: how the user named it.
        num_classes: classes of the head that an adapter brings; None: the model's own head.

    Raises:
        R2FError: the weights are missing or no safetensors, do not fit config.json, or read something else than images.
    """
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        pickle = (folder / "pytorch_model.bin").exists()
        held = "holds pytorch_model.bin, a pickle, which is never opened" if pickle else f"has no {WEIGHTS}"
        raise R2FError(f"base folder '{spec}' {held}: save it with a current transformers' {SAVE}.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of error for a damaged config.json
        raise R2FError(
            f"config.json of '{spec}' is not of a model that the installed transformers knows ({reason(error)}): "
            f"save it with {SAVE}."
        ) from error
    model, classes = _load(folder, spec, config, num_classes)
    pixels = _pixels(folder, config)
    shape = _input_shape(model, config, pixels, spec)
    notes = (() if pixels.note is None else (pixels.note,)) + _notes(config, shape, pixels)
    return BaseModel(model, spec, shape, pixels.mean, pixels.std, classes, notes)


def _load(folder: Path, spec: str, config: PretrainedConfig, num_classes: int | None) -> tuple[nn.Module, int]:
    """The model, which returns logits or features, and its number of classes, 0 without a classifier."""
    has_classifier = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if has_classifier and num_classes is not None:
        config.num_labels = num_classes
    kind: Any = AutoModelForImageClassification if has_classifier else AutoModel
    try:
        with _quiet():
            model, found = kind.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",  # fused attention has no double backward, which matching needs
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise many types of error
        raise R2FError(
            f"the weights of '{spec}' cannot be loaded ({reason(error)}): save the model again with {SAVE}."
        ) from error
    other = sorted(str(one[0]) for one in found["mismatched_keys"]) + sorted(found["missing_keys"])
    heads = [name for name in other if name.split(".")[0] in HEADS]
    if len(heads) < len(other):
        name = next(name for name in other if name not in heads)
        how = "lack" if name in found["missing_keys"] else "hold another shape of"
        raise R2FError(f"the weights of '{spec}' {how} {name}, which its config.json asks for: save both with {SAVE}.")
    model.register_forward_hook(_logits if has_classifier else _features)
    usable = has_classifier and (not heads or num_classes is not None)  # a newly made head needs the adapter's values
    return model, (config.num_labels or 0) if usable else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses transformers' progress bars and its table of missing tensors; `_load` checks those that matter."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _logits(model: nn.Module, args: Any, output: Any) -> Tensor:
    """A forward hook: logits [n, classes] in place of transformers' output object, as timm's models give them."""
    logits: Tensor = output.logits
    return logits


def _features(model: nn.Module, args: Any, output: Any) -> Tensor:
    """A forward hook: features [n, d] of a model without a classifier."""
    pooled: Tensor | None = output.pooler_output
    return output.last_hidden_state.mean(1) if pooled is None else pooled


def _pixels(folder: Path, config: PretrainedConfig) -> Pixels:
    """From preprocessor_config.json where it is there, else what the model's type usually takes."""
    path = folder / PREPROCESSOR
    channels = _vision(config, "num_channels", 3)
    if not path.is_file():
        default = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
        mean, std = (channel[:1] * channels if channels != 3 else channel for channel in _statistics(config, default))
        note = f"The base folder has no {PREPROCESSOR}: pixel mean {_listed(mean)} and std {_listed(std)} are assumed."
        return Pixels(None, tuple(mean), tuple(std), note)
    try:
        read = json.loads(path.read_text())
        factor = float(read.get("rescale_factor", 1 / 255)) if read.get("do_rescale", True) else 1 / 255
        scale = 255 * factor  # the processor subtracts the mean after rescaling bytes
        normalized = read.get("do_normalize", True)
        mean, std = (
            tuple(each / scale for each in _per_channel(read.get(name, default) if normalized else default, channels))
            for name, default in (("image_mean", 0.0), ("image_std", 1.0))
        )
        cropped = read.get("do_center_crop", "crop_size" in read) and "crop_size" in read
        return Pixels(_size(read.get("crop_size" if cropped else "size")), mean, std)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise R2FError(f"{path} is damaged ({reason(error)}): save the image processor again.") from error


def _statistics(config: PretrainedConfig, default: tuple[Any, Any]) -> tuple[Any, Any]:
    return STATISTICS.get(config.model_type, default)


def _per_channel(value: Any, channels: int) -> tuple[float, ...]:
    values = (float(value),) * channels if isinstance(value, (int, float)) else tuple(map(float, value))
    if len(values) != channels:
        raise ValueError(f"{len(values)} pixel statistics for {channels} channels")
    return values


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) of a size in preprocessor_config.json: a number, or height and width, or the shortest edge."""
    if isinstance(value, dict):
        edge = value.get("shortest_edge")
        height, width = value.get("height", edge), value.get("width", edge)
        return None if height is None or width is None else (int(height), int(width))
    return None if value is None else (int(value), int(value))


def _vision(config: PretrainedConfig, name: str, default: Any) -> Any:
    """A field of the configuration or of its vision part (CLIP, SigLIP)."""
    return getattr(config, name, None) or getattr(getattr(config, "vision_config", None), name, None) or default


def _input_shape(model: Any, config: PretrainedConfig, pixels: Pixels, spec: str) -> tuple[int, int, int]:
    """The input that the image processor makes where the model reads it, else that of the configuration."""
    side = _vision(config, "image_size", None)
    built_for = None if side is None else _size({"height": side[0], "width": side[1]} if _pair(side) else side)
    channels = int(_vision(config, "num_channels", 3))
    problem = "neither config.json nor the image processor gives its input size"
    for size in (pixels.size, built_for):
        if size is None:
            continue
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, channels, *size))
            return (channels, *size)
        except Exception as error:  # each model refuses other sizes in its own way
            problem = reason(error)
    raise R2FError(f"'{spec}' does not read images by themselves ({problem}): pass a vision model.")


def _pair(side: Any) -> bool:
    return isinstance(side, (list, tuple))


def _notes(config: PretrainedConfig, shape: tuple[int, int, int], pixels: Pixels) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    if pixels.size is not None and pixels.size != shape[1:]:
        notes += (
            f"{PREPROCESSOR} makes images of {pixels.size[0]}x{pixels.size[1]}, which the model does not read: "
            f"{shape[1]}x{shape[2]}, from config.json, is used.",
        )
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        notes += (
            f"config.json says problem_type={problem}: the victim's loss was then not the cross-entropy over classes "
            "that is assumed here.",
        )
    return notes


def _listed(values: Any) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def current_names(names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Module paths that an older transformers gave -> those of the installed version, where the model has them.

    transformers renames modules between versions (`vit.encoder.layer.0.attention.attention.query` became
    `vit.layers.0.attention.q_proj`) and renames a checkpoint's tensors when it loads them; adapters are left to PEFT.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    own = dict(model.named_modules())
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    found = {}
    for name in names:
        if name not in own:
            current = rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")
            if current in own:
                found[name] = current
    return found
