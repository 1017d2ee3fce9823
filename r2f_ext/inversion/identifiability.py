"""Which routes can recover an image exactly, decided by counting equations before any route runs."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.inversion.route import Problem, Verdict
from r2f_ext.inversion.routes import verdicts_of
from r2f_ext.models import shape_of
from r2f_ext.types import BaseModel, Target


def identifiability(
    base: BaseModel | nn.Module | str,
    *,
    adapter: Target | None = None,
    shared: Collection[str] | None = None,
    steps: int | None = None,
    batch: int = 1,
) -> dict[str, Verdict]:
    """Count unknowns and equations of every route in the registry.

    Args:
        base: the public base; or a timm model; or a timm model's name, counted without its weights.
        adapter: which layers the victim adapts. None: exact gradients are observed. The two Phase 0 routes,
            patch_position and attention_rowspace, always refer to exact gradients.
        shared: names of the parameters whose exact gradients are observed; None: of all.
        steps: the victim's steps T, if known.
        batch: images in the group, b.

    Returns:
        route -> verdict, in the registry's order.

    Raises:
        R2FError: steps or batch is not positive, or the base has no such model or parameter.
    """
    if batch < 1 or (steps is not None and steps < 1):
        raise R2FError(f"a group has at least one image and one step, not batch {batch} and steps {steps}.")
    base = base if isinstance(base, BaseModel) else shape_of(base)
    known = {name for name, _ in base.model.named_parameters()}
    unknown = sorted(set(shared or ()) - known)
    if unknown:
        raise R2FError(f"base '{base.spec}' has no parameter {unknown[0]}: name those of named_parameters().")
    return verdicts_of(Problem(base, target=adapter, shared=shared, steps=steps, batch=batch))
