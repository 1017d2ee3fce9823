"""Reads a PEFT LoRA folder into a Target and a LoraUpdate. PEFT itself places the factors; nothing is unpickled."""

from __future__ import annotations

import copy
import json
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from r2f_ext.errors import R2FError
from r2f_ext.types import AdaptedLayer, BaseModel, LoraUpdate, Target

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# A has forgotten its start when its smallest singular value is below this fraction of what a random start would have.
FORGOTTEN = 1e-2

# Fields of adapter_config.json that are passed on to PEFT. Paths, revisions and code references are never read.
USED_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "modules_to_save",
)
# Fields that do not change what A and B mean: descriptions, and settings that act in training or in a refused variant.
HARMLESS_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# Well-known variants by name, for the message. Any other field that is not at its default is refused as well.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "LoRA bias",
    "bias": "trained biases",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "corda_config": "CorDA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "eva_config": "EVA",
    "lora_ga_config": "LoRA-GA",
    "loftq_config": "LoftQ",
    "megatron_config": "Megatron",
}
DEFAULTS = {field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING}
PLAIN_INITS = (True, "gaussian")


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of a PEFT folder after the checks: plain LoRA, finite numbers, no pickle.

    Attributes:
        folder: where they were read from.
        config: the fields of adapter_config.json that are used.
        weights: PEFT's state dict.
    """

    folder: Path
    config: dict
    weights: dict[str, Tensor]

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the head saved with the adapter (`modules_to_save`), if there is one."""
        heads = [w for name, w in self.weights.items() if name.removeprefix(PREFIX) in ("head.weight", "fc.weight")]
        return heads[0].shape[0] if heads else None


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read and check a PEFT LoRA folder without binding it to a base.

    Raises:
        R2FError: a file is missing or broken, only a pickle is there, the variant is not plain LoRA,
            or a factor holds NaN or infinity.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise R2FError(f"adapter folder '{folder}' does not exist: pass a folder written by PEFT's save_pretrained.")
    config = _read_config(folder)
    weights = read_factors(folder)
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise R2FError(
            f"adapter '{folder}' holds NaN or infinity in {bad[0]}: it diverged or is damaged; save it again."
        )
    factors = [tensor for name, tensor in weights.items() if ".lora_B" in name]
    if factors and not any(tensor.any() for tensor in factors):
        raise R2FError(f"adapter '{folder}' is untrained: every B is zero, so it holds nothing of any data.")
    return AdapterFiles(folder, config, weights)


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise R2FError(f"'{folder}' has no {CONFIG}: pass a folder written by PEFT's save_pretrained.")
    try:
        raw = json.loads(path.read_text())
        kind = raw.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise R2FError(f"{path} is not a JSON object: save the adapter again with PEFT.") from error
    if kind != "LORA":
        raise R2FError(f"{path} is a {kind} adapter: only plain LoRA (peft_type LORA) is supported.")
    for name in raw.keys() - {*USED_FIELDS, *HARMLESS_FIELDS, "init_lora_weights"}:
        if raw[name] and raw[name] != DEFAULTS.get(name):
            raise R2FError(
                f"{path} uses {VARIANTS.get(name, 'a setting that is not known here')} ({name}): "
                "only plain LoRA is supported; train without it."
            )
    init = raw.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise R2FError(
            f"{path} uses init_lora_weights={init!r}, which changes the base: only PEFT's default start is supported."
        )
    return {name: raw[name] for name in USED_FIELDS if raw.get(name) is not None}


def read_factors(folder: Path) -> dict[str, Tensor]:
    """PEFT's state dict of an adapter folder, trained or not.

    Raises:
        R2FError: adapter_model.safetensors is missing or broken.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise R2FError(f"'{folder}' holds {PICKLE}, a pickle, which is never opened: save it as safetensors.")
        raise R2FError(f"'{folder}' has no {WEIGHTS}: save the adapter with PEFT's save_pretrained.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise R2FError(f"{path} is truncated or not a safetensors file: copy it again.") from error


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
        (target, update); factors are float32 (float64 stays float64) on the base's device.

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
    return Target(replace(base, model=model), tuple(layers)), LoraUpdate(a, b)


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


def untouched_a(update: LoraUpdate) -> bool:
    """Whether every A can still be what PEFT drew: its default start is uniform within 1 / sqrt(d_in).

    After one step A equals its start, because grad_A = 0 while B = 0 (docs/methods.md, section 1). Later steps move
    some entries out of that range, or weight decay shrinks all of them.
    """
    return all(
        float(a.abs().max()) <= a.shape[1] ** -0.5 * (1 + 1e-6) and not forgot_start(a) for a in update.a.values()
    )


def forgot_start(a: Tensor) -> bool:
    """Whether weight decay has shrunk some singular values of A [r, d_in] far below those of a random start.

    The smallest singular value of a random A is about (1 - sqrt(r / d_in)) / (1 + sqrt(r / d_in)) of its largest
    (Marchenko and Pastur 1967).
    """
    if not torch.isfinite(a).all():
        return False
    singular = torch.linalg.svdvals(a.double())
    return bool(singular[-1] < FORGOTTEN * (1 - (len(a) / a.shape[1]) ** 0.5) * singular[0])
