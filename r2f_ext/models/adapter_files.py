"""Reads a PEFT LoRA folder and checks it, without a base model. Nothing is unpickled, no path in a file is followed."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.models.facts import AdapterFacts

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

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
        weights: PEFT's state dict of the factors.
        saved: whole parameters beside them, without PEFT's prefix.
        facts: what the folder says beside its factors.
    """

    folder: Path
    config: dict
    weights: dict[str, Tensor]
    saved: dict[str, Tensor]
    facts: AdapterFacts

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the head saved with the adapter (`modules_to_save`), if there is one."""
        heads = [w for name, w in self.saved.items() if name in ("head.weight", "fc.weight")]
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
    saved = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if ".lora_" not in name}
    weights = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    return AdapterFiles(folder, config, weights, saved, AdapterFacts(folder.resolve().name))


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
