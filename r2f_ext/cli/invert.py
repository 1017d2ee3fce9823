"""`r2f invert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from r2f_ext.audit.figures import write_images
from r2f_ext.audit.row_space import run_row_space
from r2f_ext.audit.run import match_decoded, refine
from r2f_ext.cli.display import console, drawn_stages, table
from r2f_ext.cli.inputs import Options, check_same_a, read_adapters
from r2f_ext.config import AuditConfig
from r2f_ext.decoders import stack_updates
from r2f_ext.decoders.store import read_gradients
from r2f_ext.files import output_folder, write_tensors
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.gauss_newton import Subspace, gauss_newton, obstacle
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.unet import UNetConfig, UNetInverter
from r2f_ext.pairs import StoredPairs
from r2f_ext.types import LoraUpdate, Reconstruction, Target


def run_invert(options: Options) -> dict[str, Any]:
    target, adapters = read_adapters([options.adapter], options)
    folder = output_folder(options.out)
    pairs = StoredPairs(options.pairs, target.base)
    check_same_a(pairs, adapters[0])
    gradients = None if options.gradients is None else read_gradients(Path(options.gradients), target, len(adapters))
    observed, config = stack_updates(adapters), AuditConfig(seed=options.seed)
    pull = None if options.prior is None else ScoreDistillation.from_folder(options.prior, seed=options.seed).gradient
    row_space = _row_space(target, adapters, options)
    with drawn_stages() as stages:
        with stages.stage("amortised"):
            images, labels = pairs.samples()
            inverter = AmortisedInverter(pairs.updates(0, len(pairs)), images, labels, target.base.num_classes)
            found = [inverter.invert(observed)]
            far = int(inverter.far_from_proxy(observed).sum())
        if options.inverter == "unet":
            net = UNetConfig(seed=options.seed)
            with stages.stage("U-Net", net.epochs) as advance:
                found = [UNetInverter(inverter, net, advance).invert(observed)]
        with stages.stage("refinement", config.refinement.steps) as advance:
            found.append(refine(target, pairs.a, observed, found[0], config.refinement, advance, pull))
        if options.gauss_newton and _gauss_newton_applies(target, adapters):
            with stages.stage("gauss_newton", len(adapters)) as advance:
                found.append(gauss_newton(target, pairs.a, observed, found[0], Subspace.of(images), advance=advance))
        found += row_space
        if gradients is not None:
            with stages.stage("matching", config.matching.steps) as advance:
                found.append(match_decoded(target, gradients, found[0], config.matching, advance, pull))
    for part in found:
        write_images(folder / f"{part.route}.png", [(part.route, part.images.cpu())])
    write_tensors(folder / "images.safetensors", {part.route: part.images for part in found})
    if far:
        console.print(
            f"warning: {far} of {len(adapters)} updates resemble no proxy update: the amortised estimate is not to be "
            "trusted; use a proxy that is nearer to the private data, or procedural."
        )
    table("Routes taken", ["route", "seconds", "why"], [[p.route, f"{p.seconds:.1f}", p.why] for p in found])
    console.print(f"images: {escape(str(folder))}")
    routes = {p.route: {"seconds": p.seconds, "why": p.why, "details": p.details} for p in found}
    return {"routes": routes, "far_from_proxy": far}


def _row_space(target: Target, adapters: list[LoraUpdate], options: Options) -> list[Reconstruction]:
    outcome = run_row_space(target, adapters, options.initial, options.a0_seed)
    console.print(f"adapter_rowspace: {escape(outcome.why)}")
    return [] if outcome.found is None else [outcome.found]


def _gauss_newton_applies(target: Target, adapters: list[LoraUpdate]) -> bool:
    reason = obstacle(target, adapters)
    if reason is not None:
        console.print(f"gauss_newton is refused: {reason}.")
    return reason is None
