"""`r2f invert`: an adapter's update to images, by the routes of the registry, from stored pairs."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from r2f_ext.audit.invert import Inverted, invert
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import console, drawn_stages, table
from r2f_ext.cli.inputs import Options
from r2f_ext.config import AuditConfig
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.unet import UNetConfig
from r2f_ext.types import Reconstruction


def run_invert(options: Options) -> dict[str, Any]:
    """Invert one adapter; returns what --json writes."""
    with drawn_stages() as stages:
        found = invert(
            options.adapter,
            options.pairs,
            base=options.base,
            gradients=options.gradients,
            out=options.out,
            config=AuditConfig(
                routes=options.routes,
                gauss_newton=options.gauss_newton,
                search=GaussNewtonConfig(minutes=options.budget),
                seed=options.seed,
            ),
            unet=UNetConfig(seed=options.seed) if options.inverter == "unet" else None,
            prior=options.prior,
            device=chosen_device(options),
            initial=options.initial,
            a0_seed=options.a0_seed,
            stages=stages,
        )
    return _printed(found, options.out)


def _printed(found: Inverted, out: str) -> dict[str, Any]:
    far = int(found.far.sum())
    if far:
        console.print(
            f"warning: {far} of {found.problem.victims} updates resemble no proxy update: do not trust the amortised "
            "estimate; use a proxy that is nearer to the private data, or procedural."
        )
    parts = found.reconstructions
    table("Routes taken", ["route", "seconds", "why"], [[p.route, f"{p.seconds:.1f}", p.why] for p in parts])
    evidence = list(found.problem.evidence.sentences) if found.problem.evidence is not None else []
    for sentence in evidence:
        console.print(escape(sentence))
    for route, why in found.not_run.items():
        console.print(f"{route}: {escape(why)}")
    console.print(f"images: {escape(out)}")
    routes = {part.route: _figures(part) for part in parts}
    return {"routes": routes, "not_run": found.not_run, "far_from_proxy": far, "evidence": evidence}


def _figures(part: Reconstruction) -> dict[str, Any]:
    per_victim = {name: values.tolist() for name, values in part.per_victim.items()}
    return {"seconds": part.seconds, "why": part.why, "details": part.details, "per_victim": per_victim}
