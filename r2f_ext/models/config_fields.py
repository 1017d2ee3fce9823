"""Reads adapter_config.json: every field is checked for its type and range, used, known to be harmless, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import filterfalse
from pathlib import Path
from typing import Any

from peft import LoraConfig

from r2f_ext.errors import R2FError, plain
from r2f_ext.models.patterns import check_patterns
from r2f_ext.models.safetensors_header import read_json
from r2f_ext.models.starts import START_CONFIGS, start_of

MAX_RANK = 65_536
MAX_ALPHA = 1e9
MAX_NAMES = 4096


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json of a plain LoRA adapter.

    Attributes:
        lora: the arguments of PEFT's LoraConfig that place and scale the factors, and modules_to_save, a list.
        dropout: lora_dropout.
        init: init_lora_weights as text: "true", "gaussian" or "eva".
        base_name: base_model_name_or_path, a text that is shown and never opened.
        notes, leaks: sentences for `AdapterFacts`.
    """

    lora: dict[str, Any]
    dropout: float
    init: str
    base_name: str | None
    notes: tuple[str, ...]
    leaks: tuple[str, ...]


def _whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _scale(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_ALPHA <= value <= MAX_ALPHA and value != 0


def _share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, str) or _list_of(value, str)


def _indices(value: Any) -> bool:
    return type(value) is int or (_list_of(value, int) and all(type(index) is int for index in value))


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(item, kind) for item in value)


def _pattern_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and len(value) <= MAX_NAMES and all(map(check, value.values()))


# Name -> (check, what it must be). PEFT's LoraConfig gets these; `null` stands for PEFT's default.
USED_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_whole, f"a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": (_scale, "a number other than 0, which would scale the update to nothing"),
    "target_modules": (_names, f"a pattern or a list of up to {MAX_NAMES} names"),
    "exclude_modules": (_names, f"a pattern or a list of up to {MAX_NAMES} names"),
    "layers_to_transform": (_indices, f"a whole number or a list of up to {MAX_NAMES} of them"),
    "layers_pattern": (_names, f"a name or a list of up to {MAX_NAMES} names"),
    "rank_pattern": (_pattern_of(_whole), f"an object of whole numbers from 1 to {MAX_RANK}"),
    "alpha_pattern": (_pattern_of(_scale), "an object of numbers other than 0"),
    "use_rslora": (_flag, "true or false"),
    "fan_in_fan_out": (_flag, "true or false"),
    "modules_to_save": (_names, f"a list of up to {MAX_NAMES} names"),
}
# Read here and not passed on.
READ_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lora_dropout": (_share, "a number from 0 to below 1"),
}
# Fields that do not change what A and B mean: descriptions, and settings that act in training or in a refused variant.
HARMLESS_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "quantization_config",
    "revision",
    "runtime_config",
    "task_type",
    *START_CONFIGS,
)
# Well-known variants by name, for the message. Any other field that is not at its default is refused as well.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "LoRA bias",
    "bias": "trained biases",
    "enable_lora": "a merged linear layer of loralib or an early PEFT, with factors for parts of one layer",
    "ensure_weight_tying": "tied weights",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron",
}
DEFAULTS = {field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING}
QUANTISED = re.compile(r"(?<![a-z0-9])(bnb|[48]-?bit|gptq|awq|int[48])(?![a-z0-9])", re.IGNORECASE)
PLAIN_PATH = re.compile(r"\^?(\w|-|\\?\.)*\$?")  # of a module, with or without escaped dots and anchors
LOCAL_PATH = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]")


def read_config(path: Path) -> AdapterConfig:
    """Read and check adapter_config.json.

    Raises:
        R2FError: it is damaged, is not of plain LoRA, or a field has a value that it cannot have.
    """
    raw, where = read_json(path), plain(path, 400)
    kind = raw.get("peft_type")
    if kind != "LORA":
        what = "names no peft_type" if kind is None else f"has peft_type {plain(kind, 60)}"
        raise R2FError(f"{where} {what}: only plain LoRA (peft_type LORA) is supported.")
    init = start_of(raw.get("init_lora_weights", True), where)
    _refuse_variants(raw, where)
    for name, (check, what) in {**USED_FIELDS, **READ_FIELDS}.items():
        optional = name not in ("r", "lora_alpha", "target_modules")
        if name in raw and not (raw[name] is None and optional) and not check(raw[name]):
            raise R2FError(f"{where} has {name} = {plain(json.dumps(raw[name]), 60)}: it must be {what}.")
    if not raw.get("target_modules"):
        raise R2FError(f"{where} does not say which modules it adapts (target_modules): save it again with PEFT.")
    check_patterns(_patterns(raw), where)
    if isinstance(raw.get("modules_to_save"), str):
        raw["modules_to_save"] = [raw["modules_to_save"]]
    base_name = raw.get("base_model_name_or_path")
    return AdapterConfig(
        lora={name: raw[name] for name in USED_FIELDS if raw.get(name) is not None},
        dropout=float(raw.get("lora_dropout") or 0),
        init=init,
        base_name=plain(base_name, 200) if isinstance(base_name, str) and base_name else None,
        notes=tuple(_notes(raw, init)),
        leaks=tuple(_leaks(raw)),
    )


def _refuse_variants(raw: dict[str, Any], where: str) -> None:
    known = {*USED_FIELDS, *READ_FIELDS, *HARMLESS_FIELDS, "init_lora_weights"}
    for name in raw.keys() - known:
        value = raw[name]
        off = value is None or value is False or value in ("", [], {})
        if not off and (value != DEFAULTS.get(name) or type(value) is not type(DEFAULTS.get(name))):
            raise R2FError(
                f"{where} uses {VARIANTS.get(name, 'a setting that is not known here')} ({plain(name, 60)}): "
                "only plain LoRA is supported; train without it."
            )


def _patterns(raw: dict[str, Any]) -> Iterator[str]:
    """The fields that PEFT reads as regular expressions, as it completes them (peft.utils.get_pattern_key)."""
    for name in ("target_modules", "exclude_modules"):
        if isinstance(raw.get(name), str):
            yield raw[name]
    layers = raw.get("layers_pattern") or []
    for name in [layers] if isinstance(layers, str) else layers:
        yield rf".*\.{name}\.(\d+)\."
    for field in ("rank_pattern", "alpha_pattern"):
        for key in filterfalse(PLAIN_PATH.fullmatch, raw.get(field) or {}):
            yield rf"(.*\.)?({key})$"


def _notes(raw: dict[str, Any], init: str) -> Iterator[str]:
    for name in ("r", "lora_alpha"):
        if name not in raw:
            yield f"adapter_config.json gives no {name}: PEFT's default of {DEFAULTS[name]} is taken."
    dropout = raw.get("lora_dropout")
    if dropout:
        yield (
            f"lora_dropout is {dropout:g}: training masks the inputs of A at random, and no route knows the masks, so "
            "nothing is exact."
        )
    base = raw.get("base_model_name_or_path")
    by_name = isinstance(base, str) and QUANTISED.search(base) is not None
    if by_name or raw.get("quantization_config"):
        said = f"The name of the base, '{plain(base)}', says" if by_name else "The configuration says"
        yield (
            f"{said} that the base is quantised: the adapter's gradients were taken at rounded "
            "weights, so on a base in full precision the figures are approximate."
        )
    for field, (method, made_of) in START_CONFIGS.items():
        if raw.get(field) and init != "eva":
            yield (
                f"adapter_config.json holds {field}, which PEFT ignores at this init_lora_weights; where the adapter "
                f"was converted when it was saved, the start in its factors is {method}'s, {made_of}."
            )


def _leaks(raw: dict[str, Any]) -> Iterator[str]:
    name = raw.get("base_model_name_or_path")
    if isinstance(name, str) and LOCAL_PATH.match(name):
        yield (
            f"adapter_config.json names a folder of the machine that trained it ('{plain(name)}'): names of users and "
            "projects can be read from it."
        )
