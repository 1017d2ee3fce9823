"""Names of an adapter's tensors: brought to PEFT's own form, or named as those of another program."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor

from r2f_ext.errors import R2FError, listed, plain

PREFIX = "base_model.model."
PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
MAX_KEY = 500
# Wrappers that put a name of their own into the path of every module below them, and who does it.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
OUTER = {"module", "model", "base_model"}  # DistributedDataParallel, Lightning and a doubled PEFT, in front of PREFIX
FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<kind>[AB])(\.(?P<adapter>[^.]+))?\.weight")
# Marks in a name -> (whose it is, what to do); the first that is found in any name decides.
PEFT_AGAIN = "audit the folder that PEFT's save_pretrained writes"
FOREIGN = (
    (
        r"\.lora_(down|up)\.|\.lora\.(down|up)\.|^lora_(unet|te\d?)_",
        "kohya or diffusers (lora_down, lora_up)",
        PEFT_AGAIN,
    ),
    (r"^(unet|transformer|text_encoder(_2)?)\..*\.lora_[AB]\.", "diffusers (a generative pipeline)", PEFT_AGAIN),
    (r"lora_magnitude_vector|\.dora_scale", "DoRA (a magnitude for each output)", "train plain LoRA"),
    (r"lora_embedding_[AB]", "LoRA on an embedding table", "train LoRA on linear layers only"),
    (r"\.lora_[AB](\.[^.]+)?\.bias$", "LoRA with a bias of its own (lora_bias)", "train with lora_bias=False"),
    (r"\.lora_[AB]$", "loralib (lora_A without .weight)", "train with PEFT, whose factors end in lora_A.weight"),
    (r"\.lokr_|\.hada_|\.oft_|\.lora_E(\.|$)|vera_|\.ia3_", "another method than LoRA", "train plain LoRA"),
)


@dataclass(frozen=True)
class Keys:
    """Tensors under canonical names.

    Attributes:
        weights: `base_model.model.<module>.lora_A.weight` [r, d_in] and `.lora_B.weight` [d_out, r].
        saved: everything else, without the prefix ("head.weight").
        notes: sentences on what was renamed.
    """

    weights: dict[str, Tensor]
    saved: dict[str, Tensor]
    notes: tuple[str, ...]


def canonical(tensors: dict[str, Tensor], where: str) -> Keys:
    """Sort a state dict into LoRA factors and other tensors, both under the names that PEFT's save_pretrained gives.

    Args:
        tensors: as they are stored; where: the folder, for messages.

    Raises:
        R2FError: the names are those of another program or method, no module can have them, two adapters are mixed, or
            two names become one.
    """
    refuse_foreign(tensors, where)
    adapters = {match["adapter"] for match in map(FACTOR.fullmatch, tensors) if match} - {None}
    if len(adapters) > 1:
        raise R2FError(
            f"{where} mixes the factors of several adapters ({listed(sorted(adapters))}): save them one by one with "
            "save_pretrained(..., selected_adapters=[NAME])."
        )
    adapter = next(iter(adapters), "default")
    in_front = all(key.startswith("module.") for key in tensors)  # a module may itself be called so
    weights: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = _without_wrappers(key.removeprefix("module.") if in_front else key)
        factor = FACTOR.fullmatch(name)
        if factor:
            place, new = weights, f"{PREFIX}{factor['path']}.lora_{factor['kind']}.weight"
        elif ".original_module." in name:  # PEFT's untouched copy of a saved module
            continue
        else:
            name = name.replace(f".modules_to_save.{adapter}.", ".").replace(".base_layer.", ".")
            place, new = saved, name
        if not PATH.fullmatch(new):
            raise R2FError(f"{where} holds a tensor '{plain(key)}', which no module can be called: save it with PEFT.")
        if new in place:
            raise R2FError(f"{where} holds {plain(renamed[new])} and {plain(key)}, one tensor twice: save it again.")
        place[new], renamed[new] = tensor, key
    if not weights:
        rest = f"; it holds {listed(sorted(saved), 4)}" if saved else ""
        raise R2FError(f"{where} holds no LoRA factors (lora_A, lora_B){rest}: {PEFT_AGAIN}.")
    return Keys(weights, saved, tuple(_notes(tensors, in_front, adapters)))


def refuse_foreign(names: Iterable[str], where: str) -> None:
    """Raise R2FError where a name is one that another program or method gives, or is no name at all."""
    for name in names:
        if not name or len(name) > MAX_KEY:
            raise R2FError(f"{where} holds a tensor with a name of {len(name)} characters: save it again with PEFT.")
        for mark, what, remedy in FOREIGN:
            if re.search(mark, name):
                raise R2FError(f"{where} is of {what}, as its tensor {plain(name)} shows: {remedy}.")


def _without_wrappers(key: str) -> str:
    """A key without wrappers and without PEFT's prefix, once or several times."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    name = ".".join(parts)
    start = name.rfind(PREFIX)
    if start >= 0 and set(name[:start].split(".")) <= OUTER | {""}:
        return name[start + len(PREFIX) :]
    return name


def _notes(keys: Collection[str], in_front: bool, adapters: set[str | None]) -> list[str]:
    found = [f"{part} ({by})" for part, by in WRAPPERS.items() if any(part in key.split(".") for key in keys)]
    if in_front:
        found.append("module (DistributedDataParallel)")
    if any(key.startswith(f"model.{PREFIX}") for key in keys):
        found.append("model (a module around PEFT's, as Lightning has it)")
    if any(key.count(PREFIX) > 1 for key in keys):
        found.append("a second base_model.model")
    if adapters:
        found.append(f"the adapter's name {listed(sorted(map(str, adapters)))}")
    notes = []
    if found:
        notes.append(f"Names of tensors were freed of what the base's paths do not have: {', '.join(found)}.")
    if not all(PREFIX in key for key in keys):
        notes.append("Names of tensors lack PEFT's base_model.model: the paths are taken as they stand.")
    return notes
