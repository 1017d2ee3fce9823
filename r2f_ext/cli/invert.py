"""`r2f invert`: an adapter's update to images, by the routes of the registry, from stored pairs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from r2f_ext.audit.figures import write_images
from r2f_ext.audit.memory import fit_to_memory
from r2f_ext.cli.display import console, drawn_stages, table
from r2f_ext.cli.inputs import read_adapters
from r2f_ext.config import AuditConfig
from r2f_ext.decoders.store import read_gradients
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.route import Problem, Proxies, adapter_problem
from r2f_ext.inversion.routes import default_routes, run_routes, verdicts_of
from r2f_ext.inversion.unet import UNetConfig
from r2f_ext.models import InitialFactors, differing_layer
from r2f_ext.pairs import StoredPairs, Training
from r2f_ext.types import LoraUpdate, Reconstruction


def run_invert(options: argparse.Namespace) -> dict[str, Any]:
    """Run the routes that the adapter, the pairs and the decoded gradients allow; returns what --json writes."""
    target, adapters = read_adapters([options.adapter], options)
    folder = output_folder(options.out)
    pairs = StoredPairs(options.pairs, target.base)
    check_same_a(pairs, adapters[0])
    config = fit_to_memory(target, len(adapters), len(pairs), AuditConfig(seed=options.seed))
    initial = InitialFactors(target, adapters[0], options.initial, options.a0_seed)
    problem = replace(
        adapter_problem(target, adapters, initial),
        a=pairs.a,
        training=_training(pairs),
        decoded=None if options.gradients is None else read_gradients(Path(options.gradients), target, len(adapters)),
        proxies=Proxies(pairs.updates(0, len(pairs)), *pairs.samples(), target.base.num_classes),
        matching=config.matching,
        refinement=config.refinement,
        unet=UNetConfig(seed=options.seed) if options.inverter == "unet" else None,
        prior=None
        if options.prior is None
        else ScoreDistillation.from_folder(options.prior, seed=options.seed).gradient,
    )
    with drawn_stages() as stages:
        outcome = run_routes(problem, verdicts_of(problem), chosen_routes(options), stages)
    return _written(folder, problem, outcome.reconstructions, outcome.not_run)


def chosen_routes(options: argparse.Namespace) -> tuple[str, ...]:
    """The routes that --routes names, or the default ones; and gauss_newton with --gauss-newton."""
    named = default_routes() if options.routes is None else tuple(options.routes)
    return (*named, "gauss_newton") if options.gauss_newton else named


def check_same_a(pairs: StoredPairs, adapter: LoraUpdate) -> None:
    """Refuse pairs that were not made with this adapter's A.

    Raises:
        R2FError: the sentence names a layer that differs.
    """
    if pairs.own_a:
        raise R2FError(f"each victim of '{pairs.folder}' has an A of its own: make pairs without --own-a.")
    name = differing_layer(pairs.a, adapter.a)
    if name is not None:
        raise R2FError(
            f"the pairs in '{pairs.folder}' were made for another adapter (A of {name} differs): make new ones."
        )


def _training(pairs: StoredPairs) -> Training | None:
    """The recipe of the stored victims, where they were simulated with one."""
    recipe = pairs.manifest.get("training")
    return None if recipe is None else Training(**recipe)


def _written(folder: Path, problem: Problem, found: list[Reconstruction], not_run: dict[str, str]) -> dict[str, Any]:
    for part in found:
        write_images(folder / f"{part.route}.png", [(part.route, part.images.cpu())])
    write_tensors(folder / "images.safetensors", {part.route: part.images for part in found})
    assert problem.proxies is not None and problem.observed is not None
    far = int(problem.proxies.ridge.far_from_proxy(problem.observed).sum())
    if far:
        console.print(
            f"warning: {far} of {problem.victims} updates resemble no proxy update: do not trust the amortised "
            "estimate; use a proxy that is nearer to the private data, or procedural."
        )
    table("Routes taken", ["route", "seconds", "why"], [[p.route, f"{p.seconds:.1f}", p.why] for p in found])
    for route, why in not_run.items():
        console.print(f"{route}: {escape(why)}")
    console.print(f"images: {escape(str(folder))}")
    return {"routes": {p.route: _figures(p) for p in found}, "not_run": not_run, "far_from_proxy": far}


def _figures(part: Reconstruction) -> dict[str, Any]:
    per_victim = {name: values.tolist() for name, values in part.per_victim.items()}
    return {"seconds": part.seconds, "why": part.why, "details": part.details, "per_victim": per_victim}
