"""`r2f pairs`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.markup import escape
from torch import Tensor

from r2f_ext.cli.display import console, drawn_stages, print_notes
from r2f_ext.cli.inputs import Options, read_adapter
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder
from r2f_ext.models.evidence import evidence_of, start_notes
from r2f_ext.pairs import (
    PairsPlan,
    ReprojectedPairs,
    StoredPairs,
    Training,
    WritablePairs,
    pairs_from_images,
    plan_pairs,
)
from r2f_ext.types import Target


def run_pairs(options: Options) -> dict[str, Any]:
    loaded = read_adapter(options)
    target, (adapter,) = loaded.target, loaded.updates
    folder = output_folder(options.out)
    print_notes(start_notes([adapter], evidence_of([adapter.without_saved()], loaded.facts).steps))
    a = {name: a.float() for name, a in adapter.start.items()}
    pairs = _new_pairs(options, target, a)
    plan = plan_pairs(pairs, min(options.count, len(pairs)), folder, options.dense)
    _print_plan(plan)
    made = plan.count - plan.found
    with drawn_stages() as stages, stages.stage("pairs", made) as advance:
        plan.write(advance)
    rate = made / stages.seconds["pairs"]
    if made:
        console.print(f"{made} pairs made, {rate:,.0f} a second; {plan.count} in {escape(str(folder))}")
    return {"count": plan.count, "made": made, "per_second": rate, "proxy": pairs.recipe["proxy"]}


def _print_plan(plan: PairsPlan) -> None:
    """The pairs' size, and what the folder holds of them already."""
    place = escape(str(plan.folder))
    console.print(f"{plan.count:,} pairs take {plan.size / 1e9:.2f} GB on disk")
    if plan.finished:
        console.print(
            f"'{place}' holds these {plan.count} pairs already, made by the same recipe: nothing is left to do."
        )
    elif plan.found:
        console.print(f"'{place}' holds {plan.found} of the {plan.count} pairs: only the others are made.")
    elif plan.replaces:
        console.print(f"'{place}' holds unfinished pairs of another recipe: they are removed, and all are made anew.")


def _new_pairs(options: Options, target: Target, a: dict[str, Tensor]) -> WritablePairs:
    training = _training(options)
    if options.cache is not None:
        if training is not None or options.dense:
            raise R2FError("--cache holds gradients of one step at the start: leave training and --dense out.")
        if Path(options.cache).resolve() == Path(options.out).resolve():
            raise R2FError(f"--cache and --out are the same folder '{options.out}': name another one.")
        return ReprojectedPairs(
            StoredPairs(options.cache, target.base), target, a, options.seed if options.per_victim_a else None
        )
    return pairs_from_images(
        target,
        a,
        options.proxy,
        options.count,
        training,
        seed=options.seed,
        per_victim_a=options.per_victim_a,
        dense=options.dense,
        precision=options.precision,
    )


def _training(options: Options) -> Training | None:
    """The victims' training if any of its options was given; otherwise None, for one step of SGD on one image."""
    given = {f.name: getattr(options, f.name) for f in fields(Training) if getattr(options, f.name) is not None}
    return Training(**given) if given else None
