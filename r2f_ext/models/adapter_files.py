"""Reads a PEFT LoRA folder and checks it, without a base model. Nothing is unpickled, no path in a file is followed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from r2f_ext.errors import R2FError, listed, plain
from r2f_ext.models.config_fields import AdapterConfig, read_config
from r2f_ext.models.factors import Factors, check_factors, check_numbers, factor_pairs
from r2f_ext.models.facts import AdapterFacts
from r2f_ext.models.folder import (
    CONFIG,
    WEIGHTS,
    adapters_below,
    check_adapter_folder,
    check_folder,
    leaks_beside,
    regular_file,
    weight_files,
)
from r2f_ext.models.keys import PREFIX, Keys, canonical
from r2f_ext.models.safetensors_header import MAX_FILE, read_tensors
from r2f_ext.models.saved_head import is_head
from r2f_ext.models.starts import EVA_LEAK, EVA_UNSEEN, shows_eva

__all__ = ["CONFIG", "PREFIX", "WEIGHTS", "AdapterFiles", "read_adapter", "read_factors"]


@dataclass(frozen=True)
class AdapterFiles:
    """A PEFT folder after the checks: plain LoRA, finite numbers, no pickle.

    Attributes:
        folder: where it was read from.
        config: the arguments of PEFT's LoraConfig that place and scale the factors.
        weights: the factors of the layers whose B is not zero, under PEFT's names:
            `base_model.model.<module>.lora_A.weight` [r, d_in] and `.lora_B.weight` [d_out, r].
        facts: what the folder says beside its factors.
        saved: every other tensor by its name in the base ("head.weight"): modules that were trained as a whole.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    facts: AdapterFacts
    saved: dict[str, Tensor]

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the head saved with the adapter (`modules_to_save`), if there is one."""
        heads = [
            value
            for name, value in self.saved.items()
            if name.endswith(".weight") and is_head(name.removesuffix(".weight"))
        ]
        return next((len(weight) for weight in heads if weight.ndim == 2), None)


def read_adapter(folder: str | Path) -> AdapterFiles:
    """Read and check a PEFT LoRA folder without binding it to a base.

    Raises:
        R2FError: a file is missing or broken, only a pickle is there, the variant is not plain LoRA, a tensor is
            empty, cut or not finite, or every B is zero. The sentence says which, and the remedy.
    """
    folder = Path(folder)
    check_adapter_folder(folder)
    config = read_config(regular_file(folder, CONFIG))
    where = f"adapter '{plain(folder, 400)}'"
    keys = canonical(_stored(folder), where)
    factors = check_factors(keys.weights, keys.saved, config.lora, where)
    facts = AdapterFacts(
        name=plain(folder.resolve().name),
        notes=tuple(_notes(folder, config, keys, factors)),
        leaks=tuple(_leaks(folder, config, factors)),
        dropout=config.dropout,
        init=config.init,
        base_name=config.base_name,
        dropped=factors.dropped,
    )
    return AdapterFiles(folder, config.lora, factors.weights, facts, keys.saved)


def read_factors(folder: Path) -> dict[str, Tensor]:
    """The factors of an adapter folder under PEFT's names, trained or not (every B may be zero).

    Raises:
        R2FError: the tensors are missing, broken, empty, cut or not finite.
    """
    check_folder(folder)
    where = f"adapter '{plain(folder, 400)}'"
    keys = canonical(_stored(folder), where)
    check_numbers(keys.weights, where)
    factor_pairs(keys.weights, where)
    return keys.weights


def _stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder as they are stored, of one file or of shards."""
    tensors: dict[str, Tensor] = {}
    size = 0
    for path, promised in weight_files(folder).items():
        size += path.stat().st_size
        if size > MAX_FILE:
            raise R2FError(
                f"'{plain(folder, 400)}' has tensors of more than the {MAX_FILE:,} bytes that an adapter is read up to."
            )
        part = read_tensors(path)
        if promised is not None and promised != part.keys():
            name = sorted(promised ^ part.keys())[0]
            raise R2FError(f"{plain(path, 400)} and its index disagree about {plain(name)}: copy the folder again.")
        tensors.update(part)
    return tensors


def _notes(folder: Path, config: AdapterConfig, keys: Keys, factors: Factors) -> Iterator[str]:
    yield from config.notes
    yield from keys.notes
    yield from factors.notes
    named = config.lora.get("modules_to_save", ())
    extra = [name for name in keys.saved if not any(_of_module(module, name) for module in named)]
    if extra:
        yield (
            f"The file holds whole tensors that the configuration does not name ({listed(sorted(extra))}), beside the "
            "LoRA factors."
        )
    if config.init == "eva" and not shows_eva(factors.weights):
        yield EVA_UNSEEN
    others = adapters_below(folder, depth=1)
    if others:
        yield f"The folder holds other adapters in {listed(others)}: they are not in this audit."


def _leaks(folder: Path, config: AdapterConfig, factors: Factors) -> Iterator[str]:
    yield from config.leaks
    if config.init == "eva" and shows_eva(factors.weights):
        yield EVA_LEAK
    yield from leaks_beside(folder)


def _of_module(module: str, name: str) -> bool:
    """Whether a tensor belongs to a module called so, as PEFT matches the names in modules_to_save."""
    return f".{module}." in f".{name}"
