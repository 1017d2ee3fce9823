"""Whole parameters saved with an adapter (`modules_to_save`, extra weights): their change since the base is a gradient.

One step of plain SGD moves a weight from W_0 by -lr G. Where W_0 is the public base's, the file gives the full gradient
G of that layer exactly, up to the learning rate. A Linear or patchifying Conv2d of this kind becomes an adapted layer
with A = I and B = W - W_0, so that every route and decoder reads it like the LoRA factors.

The gradient D^T X of a patch embedding does not determine the patches X [N, c ph pw]: for every orthogonal Q [N, N] it
equals (Q D)^T (Q X). Its equations join the searches; only with the gradient of the position embedding, which is D
itself, is there a closed form (`inversion/patch_position.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2f_ext.errors import R2FError, listed
from r2f_ext.models.adapter_files import AdapterFiles
from r2f_ext.models.facts import AdapterFacts
from r2f_ext.models.saved_head import HeadLeak, head_leak, is_head, new_head_leak
from r2f_ext.models.transformers_base import current_names
from r2f_ext.types import AdaptedLayer, BaseModel, LoraUpdate, Target

MAX_NUMBERS = 1 << 18  # of a saved layer's gradient, which every proxy pair holds
MAX_INPUTS = 4096  # of a saved layer, whose A is the identity
SAME_START = 0.5  # cosine of a saved module with the base's above which its training counts as begun at the base's
BALANCED = 0.05  # largest norm of the summed rows of a head's change, relative to the change, under cross-entropy
ABOVE_ROUNDING = 3.0  # a change below this many times the rounding of its storage is not read
LISTED = 5  # names in a sentence


@dataclass(frozen=True)
class SavedModules:
    """The whole parameters in an adapter's file, compared with the base's.

    Attributes:
        layers: Linear and patchifying Conv2d layers that moved from the base's weight: A = I, scale 1.
        change: layer -> end - start [d_out, d_in], the layer's B.
        gradients: parameter name -> start - end in the parameter's shape, of all parameters that moved from the base's.
        stand_ins: parameter name -> saved value, where the base does not hold the start.
        label: the images' class, where a saved head tells it.
        notes, leaks: sentences for `AdapterFacts`.
    """

    layers: tuple[AdaptedLayer, ...] = ()
    change: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    stand_ins: dict[str, Tensor] = field(default_factory=dict)
    label: int | None = None
    notes: tuple[str, ...] = ()
    leaks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Module:
    """One module's saved parameters, by parameter name; `start`: the base's values, empty if they do not correspond."""

    name: str
    saved: dict[str, Tensor]
    start: dict[str, Tensor]

    @property
    def change(self) -> dict[str, Tensor]:
        """end - start, float64."""
        return {name: self.saved[name].double() - start.double() for name, start in self.start.items()}

    @property
    def precision(self) -> float:
        """The relative error of the change that the rounding of its storage causes; infinite if nothing changed."""
        change = _flat(self.change.values()).norm()
        errors = [float(torch.finfo(value.dtype).eps * value.double().norm()) / 4 for value in self.saved.values()]
        return float(sum(error**2 for error in errors) ** 0.5 / change) if change > 0 else float("inf")

    @property
    def unchanged(self) -> bool:
        return bool(self.start) and all(
            torch.equal(self.saved[name], start.to(self.saved[name].dtype)) for name, start in self.start.items()
        )

    @property
    def began_at_base(self) -> bool:
        """Whether the training that made the saved values began at the base's values."""
        if not self.start:
            return False
        saved, start = _flat(self.saved.values()), _flat(self.start[name] for name in self.saved)
        if float(F.cosine_similarity(saved, start, dim=0)) > SAME_START or (not start.any() and not is_head(self.name)):
            return True
        weight = self.change.get(f"{self.name}.weight")
        if weight is None or not is_head(self.name):
            return False
        return bool(weight.sum(0).norm() < BALANCED * weight.norm())


def compare_saved(files: AdapterFiles, base: BaseModel) -> SavedModules:
    """Compare the whole parameters in an adapter's file with the base's.

    Raises:
        R2FError: a parameter that is no head's has another shape than the base's.
    """
    found = SavedModules(notes=_not_in_the_file(files, base))
    for module in _by_module(files, base):
        if module.unchanged:
            notes = (f"The file also holds {_listed(module.saved)} as the base has it: it was not trained.",)
        elif not module.start and not _can_stand_in(module.name, module.saved, base):
            notes = (f"The file also holds {_listed(module.saved)}, which the base does not have: no route reads it.",)
        elif not module.began_at_base:
            found = _with_stand_in(found, module)
            continue
        elif module.precision * ABOVE_ROUNDING > 1:
            kind = str(next(iter(module.saved.values())).dtype).removeprefix("torch.")
            notes = (f"The change of {_listed(module.saved)} is within the rounding of {kind}: nothing is read of it.",)
        else:
            found = _with_gradient(found, module, base)
            continue
        found = replace(found, notes=found.notes + notes)
    return found


def with_saved_modules(target: Target, update: LoraUpdate, saved: SavedModules) -> tuple[Target, LoraUpdate]:
    """Add the saved layers, in the model's order and instead of LoRA factors of the same layer, and the stand-ins."""
    if not saved.gradients and not saved.stand_ins:
        return target, update
    base = _with_values(target.base, saved.stand_ins)
    layers = {layer.name: layer for layer in (*target.layers, *saved.layers)}
    ordered = tuple(layers[name] for name, _ in base.model.named_modules() if name in layers)
    like = next(iter(update.b.values()), torch.empty(0, dtype=update.stored))
    dtype = torch.promote_types(like.dtype, torch.float32)
    b = {name: change.to(base.device, dtype) for name, change in saved.change.items()}
    a = {name: torch.eye(change.shape[1], dtype=dtype, device=base.device) for name, change in b.items()}
    gradients = {name: gradient.to(base.device, dtype) for name, gradient in saved.gradients.items()}
    joined = replace(update, a=update.a | a, b=update.b | b, saved=frozenset(b), gradients=gradients, label=saved.label)
    return Target(base, ordered), joined


def with_saved_facts(facts: AdapterFacts, saved: SavedModules) -> AdapterFacts:
    """The facts of a folder and the sentences on its saved modules."""
    return replace(facts, notes=facts.notes + saved.notes, leaks=facts.leaks + saved.leaks)


def input_width(module: nn.Module) -> int | None:
    """d_in of a Linear or a patchifying Conv2d; None for any other kind of layer."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride:
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding in ((0, 0), "valid")
        return module.in_channels * module.kernel_size[0] * module.kernel_size[1] if plain else None
    return None


def _by_module(files: AdapterFiles, base: BaseModel) -> list[_Module]:
    own = base.model.state_dict()
    current = current_names({key.rpartition(".")[0] for key in files.saved}, base.model)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in files.saved.items():
        path, _, kind = key.rpartition(".")
        module = current.get(path, path)
        name = f"{module}.{kind}" if module else kind
        if value.is_floating_point():
            groups.setdefault(module or name, {})[name] = value
    modules = []
    for module, saved in groups.items():
        wrong = [name for name, value in saved.items() if name in own and own[name].shape != value.shape]
        if wrong and not _can_stand_in(module, saved, base):
            raise R2FError(
                f"adapter '{files.folder}' does not fit base '{base.spec}': the file holds {wrong[0]} of shape "
                f"{tuple(saved[wrong[0]].shape)}, and the base's has {tuple(own[wrong[0]].shape)}; name its own base."
            )
        whole = not wrong and all(name in own for name in saved)
        start = {name: own[name].detach().cpu() for name in saved} if whole else {}
        modules.append(_Module(module, saved, start))
    return modules


def _not_in_the_file(files: AdapterFiles, base: BaseModel) -> tuple[str, ...]:
    """Modules of the base that the configuration names as saved, and that the file does not hold."""
    paths = [name.split(".") for name in files.saved]
    named = files.config.get("modules_to_save") or ()
    lacking = [name for name in named if not any(set(str(name).split(".")) <= set(path) for path in paths)]
    ends = {end for path, _ in base.model.named_modules() for end in (path, path.rpartition(".")[2])}
    return tuple(
        f"The configuration names {name} as saved with the adapter, and the file does not hold it: the base's is used."
        for name in lacking
        if name in ends
    )


def _with_gradient(found: SavedModules, module: _Module, base: BaseModel) -> SavedModules:
    """`found`, and a module that training moved from the base's values."""
    trained = dict(base.model.named_parameters())
    change = {name: value for name, value in module.change.items() if name in trained and value.any()}
    weight = change.get(f"{module.name}.weight")
    gradients = {name: -value for name, value in change.items()}
    head = HeadLeak()
    if is_head(module.name) and weight is not None and weight.ndim == 2:
        head = head_leak(-weight, gradients.get(f"{module.name}.bias"), module.precision)
    found = replace(
        found,
        gradients=found.gradients | gradients,
        label=found.label if head.label is None else head.label,
        leaks=(*found.leaks, *head.leaks),
    )
    width = None if weight is None else input_width(base.model.get_submodule(module.name))
    if weight is None or width is None:
        said = (
            f"The file holds {_listed(change)} as trained: after one step of plain SGD the change since the base is a "
            "gradient, times the learning rate; the searches do not read it."
        )
        return replace(found, leaks=(*found.leaks, said)) if change else found
    weight = weight.flatten(1)
    size = f"{len(weight)} x {width}"
    if weight.numel() > MAX_NUMBERS or width > MAX_INPUTS:
        said = (
            f"The whole trained weight of {module.name} is in the file; its {size} numbers are too many for a search."
        )
        return replace(found, leaks=(*found.leaks, said))
    said = (
        f"The whole trained weight of {module.name} is in the file: after one step of plain SGD its change is the "
        f"layer's full gradient ({size} numbers, known to {module.precision:.0e} of its size), times the learning rate."
    )
    if isinstance(base.model.get_submodule(module.name), nn.Conv2d):
        said += " By itself it does not place the patches: every rotation of the tokens leaves it as it is."
    layer = AdaptedLayer(module.name, len(weight), width, width, 1.0, saved=True)
    return replace(
        found,
        layers=(*found.layers, layer),
        change=found.change | {module.name: weight},
        leaks=(*found.leaks, said),
    )


def _can_stand_in(module: str, saved: dict[str, Tensor], base: BaseModel) -> bool:
    """Whether `saved` is a classifier that can replace the base's, of any width, or be added to a base without one."""
    weight = saved.get(f"{module}.weight")
    if not is_head(module) or weight is None or weight.ndim != 2:
        return False
    own = dict(base.model.named_modules()).get(module)
    return isinstance(own, nn.Identity) or (isinstance(own, nn.Linear) and own.in_features == weight.shape[1])


def _with_stand_in(found: SavedModules, module: _Module) -> SavedModules:
    """`found` with one module added, whose start the base does not hold."""
    said = f"The start of {_listed(module.saved)} is not in the base: what the file holds, trained, stands in for it."
    bias = module.saved.get(f"{module.name}.bias")
    leaks = new_head_leak(bias) if is_head(module.name) and bias is not None else ()
    return replace(
        found,
        stand_ins=found.stand_ins | module.saved,
        notes=(*found.notes, said),
        leaks=(*found.leaks, *leaks),
    )


def _with_values(base: BaseModel, values: dict[str, Tensor]) -> BaseModel:
    """A copy of the base with some parameters replaced; a head may have another width than the base's."""
    if not values:
        return base
    model = copy.deepcopy(base.model)
    classes = base.num_classes
    like = next(base.model.parameters())
    own = model.state_dict()
    for name, weight in values.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not is_head(module):
            continue
        classes = len(weight)
        if name not in own or own[name].shape != weight.shape:
            head = nn.Linear(weight.shape[1], classes, bias=f"{module}.bias" in values)
            model.set_submodule(module, head.to(like).requires_grad_(False).eval())
    model.load_state_dict(values, strict=False)
    return replace(base, model=model, num_classes=classes)


def _flat(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in values])


def _listed(names: Iterable[str]) -> str:
    return listed(list(names), LISTED)
