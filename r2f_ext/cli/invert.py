"""`r2f invert`: an adapter's update to images, by the routes of the registry, from stored pairs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from r2f_ext.audit.figures import write_images
from r2f_ext.audit.inputs import load_adapters
from r2f_ext.audit.memory import fit_to_memory
from r2f_ext.audit.run import chosen_routes
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import console, drawn_stages, table
from r2f_ext.cli.inputs import check_same_a
from r2f_ext.config import AuditConfig
from r2f_ext.decoders.store import read_gradients
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.inversion.kept import KeptSearches
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.route import Problem, Proxies, adapter_problem
from r2f_ext.inversion.routes import check_runnable, run_routes, verdicts_of
from r2f_ext.inversion.unet import UNetConfig
from r2f_ext.models import InitialFactors
from r2f_ext.pairs import StoredPairs
from r2f_ext.types import Reconstruction

FEWER = "make fewer pairs (r2f pairs --count {})"  # the remedy if the stored pairs do not fit into memory


def run_invert(options: argparse.Namespace) -> dict[str, Any]:
    """Run the routes that the adapter, the pairs and the decoded gradients allow; returns what --json writes."""
    loaded = load_adapters([options.adapter], options.base, chosen_device(options))
    target, adapters = loaded.target, loaded.updates
    initial = InitialFactors(target, adapters[0], options.initial, options.a0_seed)
    given = adapter_problem(target, adapters, initial, loaded.facts)
    folder = output_folder(options.out)
    pairs = StoredPairs(options.pairs, target.base)
    check_same_a(pairs, adapters[0])
    asked = AuditConfig(
        decoder_pairs=0,
        held_out=0,
        routes=options.routes,
        gauss_newton=options.gauss_newton,
        search_minutes=options.budget,
        seed=options.seed,
    )
    config = fit_to_memory(target, len(adapters), len(pairs), asked, fewer=FEWER)
    problem = replace(
        given,
        a=pairs.a,
        training=pairs.training,
        decoded=None if options.gradients is None else read_gradients(Path(options.gradients), target, len(adapters)),
        proxies=Proxies(pairs.updates(0, len(pairs)), *pairs.samples(), target.base.num_classes),
        matching=config.matching,
        refinement=config.refinement,
        gauss_newton=replace(given.gauss_newton, minutes=config.search_minutes),
        unet=UNetConfig(seed=options.seed) if options.inverter == "unet" else None,
        kept=KeptSearches(folder, repr((pairs.fingerprint, options.inverter, options.seed))),
        prior=None
        if options.prior is None
        else ScoreDistillation.from_folder(options.prior, seed=options.seed).gradient,
    )
    verdicts, names = verdicts_of(problem), chosen_routes(config)
    check_runnable(problem, verdicts, names)
    with drawn_stages() as stages:
        outcome = run_routes(problem, verdicts, names, stages)
    return _written(folder, problem, outcome.found(), outcome.not_run)


def _written(folder: Path, problem: Problem, found: list[Reconstruction], not_run: dict[str, str]) -> dict[str, Any]:
    for part in found:
        write_images(folder / f"{part.route}.png", [(part.route, part.images.cpu())])
    write_tensors(folder / "images.safetensors", {part.route: part.images for part in found})
    if problem.kept is not None:
        problem.kept.clear()
    assert problem.proxies is not None and problem.observed is not None
    far = int(problem.proxies.ridge.far_from_proxy(problem.observed, problem.known_labels).sum())
    if far:
        console.print(
            f"warning: {far} of {problem.victims} updates resemble no proxy update: do not trust the amortised "
            "estimate; use a proxy that is nearer to the private data, or procedural."
        )
    table("Routes taken", ["route", "seconds", "why"], [[p.route, f"{p.seconds:.1f}", p.why] for p in found])
    evidence = list(problem.evidence.sentences) if problem.evidence is not None else []
    for sentence in evidence:
        console.print(escape(sentence))
    for route, why in not_run.items():
        console.print(f"{route}: {escape(why)}")
    console.print(f"images: {escape(str(folder))}")
    routes = {part.route: _figures(part) for part in found}
    return {"routes": routes, "not_run": not_run, "far_from_proxy": far, "evidence": evidence}


def _figures(part: Reconstruction) -> dict[str, Any]:
    per_victim = {name: values.tolist() for name, values in part.per_victim.items()}
    return {"seconds": part.seconds, "why": part.why, "details": part.details, "per_victim": per_victim}
