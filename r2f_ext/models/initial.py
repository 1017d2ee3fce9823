"""A before the first step (A_0): from a folder saved then, or drawn again by PEFT under a guessed seed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from r2f_ext.errors import R2FError
from r2f_ext.gpu import seeded
from r2f_ext.models.adapter_files import PREFIX, read_factors
from r2f_ext.types import LoraUpdate, Target

COMMON_SEEDS = (*range(129), 256, 512, 666, 777, 999, 1000, 1024, 1111, 1234, 1337, *range(2020, 2027), 3407, 12345)
INITS: tuple[Any, ...] = (True, "gaussian")
# The cosine of a wrong draw with the adapter's A is about 1 / sqrt(numbers in A): accept from this many times that.
CHANCE = 8.0
SAME_A = 1e-2  # how far A's of one start may differ after a small training, a share of the largest entry


@dataclass(frozen=True)
class InitialA:
    """A_0 of the adapted layers and where it was found.

    Attributes:
        a: name -> [r, d_in], on the base's device, in the adapter's dtype.
        source: where it was found, in words.
        cosine: between A_0 and the adapter's A, over all layers; near 1 after a short training.
    """

    a: dict[str, Tensor]
    source: str
    cosine: float


@dataclass(frozen=True)
class InitialFactors:
    """Where to look for A_0 of an adapter. The search runs on first access, and its result is kept.

    Attributes:
        target: base and adapted layers; update: the adapter's factors.
        folder: a PEFT folder saved before training.
        seed: torch's seed right before PEFT drew A_0. If both are None: the update's own `a0`, else common seeds are
            tried.
    """

    target: Target
    update: LoraUpdate
    folder: str | Path | None = None
    seed: int | None = None

    @property
    def named(self) -> bool:
        """Whether the user said where A_0 comes from."""
        return self.folder is not None or self.seed is not None

    @cached_property
    def found(self) -> InitialA | None:
        """A_0, or None where none of the common seeds draws it.

        Raises:
            R2FError: the folder or the seed does not belong to the adapter, or its factors are untrained.
        """
        if self.named and not self.update.without_saved().a:
            raise R2FError(
                "--initial and --a0-seed name where A started, and every B of this adapter is zero, so that nothing is "
                "read from its factors: leave them out."
            )
        if self.folder is not None:
            return initial_from_folder(self.folder, self.update)
        if self.seed is None and self.update.a0 is not None:
            return InitialA(self.update.a0, "the adapter's own file", _cosine(self.update.a0, self.update.a))
        found = initial_from_seed(self.target, self.update, COMMON_SEEDS if self.seed is None else [self.seed])
        if found is None and self.seed is not None:
            raise R2FError(f"--a0-seed {self.seed} does not draw the A that this adapter started from.")
        return found


def initial_from_folder(folder: str | Path, update: LoraUpdate) -> InitialA:
    """A_0 from a PEFT folder that was saved before training (its B is zero).

    Raises:
        R2FError: the folder does not hold an A of the same shape for every adapted layer, or it has nothing to do
            with the adapter's A.
    """
    weights, update = read_factors(Path(folder)), update.without_saved()
    a: dict[str, Tensor] = {}
    for name, trained in update.a.items():
        stored = weights.get(f"{PREFIX}{name}.lora_A.weight")
        if stored is None or stored.flatten(1).shape != trained.shape or not torch.isfinite(stored).all():
            raise R2FError(f"'{folder}' holds no A of {name} as the adapter has it: pass the adapter saved untrained.")
        a[name] = stored.flatten(1).to(trained)
    cosine = _cosine(a, update.a)
    if not _related(a, update.a):
        raise R2FError(f"A in '{folder}' is not where this adapter started (cosine {cosine:.3f} to its A).")
    return InitialA(a, f"the folder '{Path(folder).resolve().name}'", cosine)


def initial_from_seed(target: Target, update: LoraUpdate, seeds: Iterable[int] = COMMON_SEEDS) -> InitialA | None:
    """A_0 as PEFT draws it when `torch.manual_seed(seed)` is called right before `get_peft_model`, by trying seeds.

    Both of PEFT's plain inits (default and "gaussian") are tried. Draws between the seed and PEFT (a model built
    meanwhile) shift the stream: such starts are not found.

    Returns:
        None where no seed draws an A like the adapter's.
    """
    target, update = target.without_saved(), update.without_saved()
    if not target.layers:
        return None
    first = {target.names[0]: update.a[target.names[0]]}
    for seed in seeds:
        for init in INITS:
            if not _related(_draw(target, target.names[:1], seed, init, first), first):
                continue
            a = _draw(target, target.names, seed, init, update.a)
            if _related(a, update.a):
                return InitialA(a, f"PEFT's draw under torch.manual_seed({seed})", _cosine(a, update.a))
    return None


def differing_layer(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first layer, by name, in which two sets of A [r, d_in] are not one start; None: they are.

    A small training moves A a little: entries may differ by `SAME_A` of its largest.
    """
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or one[name].shape != other[name].shape:
            return name
        a, b = one[name].double(), other[name].double()
        if not torch.allclose(a, b, rtol=0, atol=SAME_A * float(b.abs().max())):
            return name
    return None


def common_a(adapters: list[LoraUpdate]) -> dict[str, Tensor]:
    """Name -> mean start [r, d_in] of adapters that share one, float32: A_0, or the A after training in its place.

    Raises:
        R2FError: the adapters adapt other layers, or their A differ by more than training explains.
    """
    first = adapters[0].start
    for other in adapters[1:]:
        name = differing_layer(first, other.start)
        if name is not None:
            raise R2FError(f"the adapters do not share one start (A of {name} differs): audit them one by one.")
    return {name: torch.stack([adapter.start[name].float() for adapter in adapters]).mean(0) for name in first}


def _draw(target: Target, names: tuple[str, ...], seed: int, init: Any, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A_0 of the first adapted layers `names`, in PEFT's order; its draws for them depend on no later layer."""
    modules = [copy.deepcopy(target.base.model.get_submodule(name)).cpu() for name in names]
    slots = [f"layer{i}" for i in range(len(modules))]
    skeleton = nn.Sequential()
    for slot, module in zip(slots, modules, strict=True):
        skeleton.add_module(slot, module)
    ranks = {slot: target.layer(name).rank for slot, name in zip(slots, names, strict=True)}
    config = LoraConfig(r=ranks[slots[0]], rank_pattern=ranks, target_modules=slots, init_lora_weights=init)
    with seeded(seed):
        wrapped = get_peft_model(skeleton, config)
    layers: list[Any] = [module for module in wrapped.modules() if isinstance(module, LoraLayer)]
    drawn = (layer.lora_A["default"].weight.detach().flatten(1) for layer in layers)
    return {name: a.to(like[name]) for name, a in zip(names, drawn, strict=True)}


def _cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    dot = sum(float((a[name].double() * b[name].double()).sum()) for name in a)
    sizes = [sum(float(x[name].double().square().sum()) for name in a) for x in (a, b)]
    return dot / max((sizes[0] * sizes[1]) ** 0.5, 1e-300)


def _related(a: dict[str, Tensor], trained: dict[str, Tensor]) -> bool:
    """Whether the cosine is larger than that of two draws."""
    return _cosine(a, trained) > min(0.9, CHANCE / sum(trained[name].numel() for name in a) ** 0.5)
