"""Binds an adapter to its base: PEFT itself places the factors."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from r2f_ext.errors import R2FError, reason
from r2f_ext.models.adapter_files import PREFIX, AdapterFiles, read_adapter
from r2f_ext.models.base import check_classifier
from r2f_ext.models.converted import split_start
from r2f_ext.models.saved_modules import SavedModules, compare_saved, input_width, with_saved_modules
from r2f_ext.models.storage import storage_dtype
from r2f_ext.models.transformers_base import current_names
from r2f_ext.types import AdaptedLayer, BaseModel, LoraUpdate, Target

A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"


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

    Whole parameters saved with the adapter become layers of their own if their training began at the base's values.
    Otherwise they replace the base's parameters: although trained, they are the best estimate of the point at which the
    victim's gradients were taken.

    Returns:
        (target, update); factors are float32 (float64 stays float64) on the base's device. Where the file holds the
        start of its factors, they are split, see `split_start`. The notes of the target's base say what could not be
        checked.

    Raises:
        R2FError: the adapter names layers or shapes that the base does not have, wraps a kind of layer other than
            Linear and patchifying Conv2d, has no trained factors and no saved layer that moved, or neither it nor the
            base has a classifier.
    """
    files, notes = _with_current_names(files, base)
    held, modules = _layer_names(files), dict(base.model.named_modules())
    for name in held:
        _check_layer(name, files, base, modules)
    placed = _placed(files, base) if held else {}

    layers: list[AdaptedLayer] = []
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for name in [name for name in placed if name in held]:  # in the order of the model
        stored_a, stored_b = _factors(name, files)
        dtype = torch.promote_types(stored_a.dtype, torch.float32)
        a[name] = stored_a.to(base.device, dtype).flatten(1)
        b[name] = stored_b.to(base.device, dtype).flatten(1)
        layers.append(AdaptedLayer(name, len(b[name]), a[name].shape[1], len(a[name]), placed[name].scaling["default"]))
    base = replace(base, notes=base.notes + notes)
    stored = [*a.values(), *b.values()] or [value for value in files.saved.values() if value.is_floating_point()]
    update, trained = LoraUpdate(a, b, stored=storage_dtype(stored)), tuple(layers)
    if trained:
        trained, update = split_start(str(files.folder), trained, update)
    saved = compare_saved(files, base)
    target, update = with_saved_modules(Target(base, trained), update, saved)
    if not target.layers:
        raise R2FError(_nothing_moved(files, saved))
    check_classifier(target.base)
    return target, update


def _nothing_moved(files: AdapterFiles, saved: SavedModules) -> str:
    """The error for an adapter whose every B is zero and which holds no layer that is known to have moved."""
    said = " ".join((*saved.notes, *saved.leaks))
    return (
        f"adapter '{files.folder}': every B is zero, and nothing that is saved beside the factors shows a change that "
        f"a route reads; pass the base that its training began from, or an adapter saved after training. {said}"
    )


def _with_current_names(files: AdapterFiles, base: BaseModel) -> tuple[AdapterFiles, tuple[str, ...]]:
    """Rename layers that an older transformers named; the configuration then lists each layer with its rank and alpha.

    The patterns of the configuration are resolved on the old names, as PEFT resolved them when the adapter was trained.
    """
    names = _layer_names(files)
    renamed = current_names(names, base.model)
    if not renamed:
        return files, ()
    config = {name: value for name, value in files.config.items() if name not in _PLACING_FIELDS}
    new = {old: renamed.get(old, old) for old in names}
    config["target_modules"] = list(new.values())
    for pattern in ("rank_pattern", "alpha_pattern"):
        given = files.config.get(pattern, {})
        values = {re.escape(now): given.get(get_pattern_key(given, old)) for old, now in new.items()}
        config[pattern] = {name: value for name, value in values.items() if value is not None}
    weights = {
        f"{PREFIX}{new[name]}{end}": files.weights[f"{PREFIX}{name}{end}"] for name in names for end in (A_KEY, B_KEY)
    }
    old, now = next(iter(renamed.items()))
    note = f"The adapter names its layers as an older transformers did: {old} is now {now}."
    return replace(files, config=config, weights=weights), (note,)


_PLACING_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _layer_names(files: AdapterFiles) -> list[str]:
    """Paths of the layers that the file holds factors of, in the file's order."""
    found = [key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in files.weights if ".lora_" in key]
    return list(dict.fromkeys(found))


def _factors(name: str, files: AdapterFiles) -> tuple[Tensor, Tensor]:
    """A and B of a layer that `_layer_names` gives: the reader has refused a factor without its partner."""
    a, b = (files.weights[f"{PREFIX}{name}{end}"] for end in (A_KEY, B_KEY))
    return a, b


def _check_layer(name: str, files: AdapterFiles, base: BaseModel, modules: dict[str, nn.Module]) -> None:
    """Refuse a layer that the base does not have, or has in another size; the sentence says which and why."""
    module = modules.get(name)
    if module is None:
        raise R2FError(_no_such_layer(name, files, base, modules))
    d_in = input_width(module)
    if d_in is None:
        raise R2FError(f"layer {name} is a {type(module).__name__}: only Linear and patchifying Conv2d are supported.")
    a, b = (factor.flatten(1) for factor in _factors(name, files))
    weight: Any = module.weight
    d_out = len(weight)
    if len(a) != b.shape[1] or (a.shape[1] == d_in and len(b) != d_out and d_out % max(len(b), 1) == 0):
        raise R2FError(
            f"adapter '{files.folder}' holds A {list(a.shape)} and B {list(b.shape)} of {name}, and the layer maps "
            f"{d_in} to {d_out} numbers: a tensor was cut, as a shard that was saved without gathering; save it whole."
        )
    if a.shape[1] != d_in or len(b) != d_out:
        raise R2FError(
            f"adapter '{files.folder}' does not fit base '{base.spec}': its {name} maps {a.shape[1]} to {len(b)} "
            f"numbers, and the base's maps {d_in} to {d_out}: {_pass_its_base(files)}."
        )


def _no_such_layer(name: str, files: AdapterFiles, base: BaseModel, modules: dict[str, nn.Module]) -> str:
    """Why the base has no layer of that name."""
    start = f"adapter '{files.folder}' does not fit base '{base.spec}': it changes {name}, and the base "
    own = [path for path, module in modules.items() if input_width(module) is not None]
    inner = next((path for path in own if name.endswith(f".{path}")), None)
    if inner is not None:
        prefix = name.removesuffix(inner)
        return (
            f"{start}has {inner}: the adapter was trained on a model that holds this one as '{prefix.rstrip('.')}'; "
            f"remove '{prefix}' from the names in its file if nothing is around it."
        )
    outer = next((path for path in own if path.endswith(f".{name}")), None)
    if outer is not None:
        return f"{start}has {outer}: the adapter was trained on a part of this model; pass that part as --base."
    shown = ", ".join(own[1:3]) or "none that LoRA can change"
    return f"{start}has no such layer (its layers: {shown}, ...): {_pass_its_base(files)}."


def _pass_its_base(files: AdapterFiles) -> str:
    said = files.facts.base_name
    return "pass the model that it was trained on as --base" + ("" if said is None else f"; it names '{_shown(said)}'")


def _wrapped(files: AdapterFiles, base: BaseModel) -> nn.Module:
    """A copy of the base's model in which PEFT has placed the adapter's factors, at their start."""
    config = {name: value for name, value in files.config.items() if name != "modules_to_save"}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # PEFT draws factors
            warnings.simplefilter("ignore")  # what PEFT warns of is checked here
            return get_peft_model(copy.deepcopy(base.model), LoraConfig(**copy.deepcopy(config)))
    except Exception as error:  # PEFT checks nothing itself, so a damaged config raises any type of error
        raise R2FError(
            f"adapter '{files.folder}' has a configuration that PEFT cannot apply to base '{base.spec}': "
            f"{reason(error, 300)}."
        ) from error


def _placed(files: AdapterFiles, base: BaseModel) -> dict[str, Any]:
    """Path in the base -> PEFT's layer, of every layer that the configuration adapts; checked against the file."""
    wrapped = _wrapped(files, base).named_modules()
    placed = {path.removeprefix(PREFIX): module for path, module in wrapped if isinstance(module, LoraLayer)}
    _check_placed(placed, files)
    return placed


def _check_placed(placed: dict[str, Any], files: AdapterFiles) -> None:
    """Refuse a file whose factors are not those of its configuration."""
    held = _layer_names(files)
    dropped = files.facts.dropped
    # PEFT leaves out the targets inside of modules that it saves whole.
    lacking = [
        name for name in placed if name not in held and name not in dropped and f"{name}.weight" not in files.saved
    ]
    extra = [name for name in held if name not in placed]
    if lacking:
        raise R2FError(
            f"adapter '{files.folder}' holds no factors of {lacking[0]}, which its configuration adapts: it was saved "
            "in part, or the configuration is another adapter's; save both again."
        )
    if extra:
        raise R2FError(
            f"adapter '{files.folder}' holds factors of {extra[0]}, which its configuration does not adapt: the "
            "configuration is another adapter's, or was changed; save both again."
        )
    for name in held:
        rank, rows = placed[name].r["default"], len(_factors(name, files)[0])
        if rank != rows:
            raise R2FError(
                f"adapter '{files.folder}' has rank {rank} for {name} in its configuration and {rows} in its file: the "
                "configuration is another adapter's, or a tensor was cut; save both again."
            )


def note_on_base(files: AdapterFiles, base: BaseModel) -> tuple[str, ...]:
    """The sentence for `AdapterFacts` where the adapter's own record does not say that it was trained on this base.

    Shapes are checked by `attach`, names here, and weights, where the update shows them, by the audit (`base_check`).
    """
    said = files.facts.base_name
    given = _last_part(base.spec)
    if said is None:
        unsaid = f"The adapter does not name its base: the figures hold if '{given}' holds the weights of its training."
        return () if base.spec == "embedded" else (unsaid,)
    if _last_part(said).casefold() == given.casefold():
        return ()
    return (
        f"The adapter names '{_shown(said)}' as its base, and it is audited on '{given}': the figures hold if both "
        "hold the same weights.",
    )


def _last_part(name: str) -> str:
    """The last part of a base's name or path."""
    return Path(name.partition(":")[2] if ":" in name else name).name or name


def _shown(name: str) -> str:
    """The name of a base without the folders of a local path."""
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else _last_part(name)
