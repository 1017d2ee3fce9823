"""`r2f demo`: train and audit 24 real victims, using only data that the package ships."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from r2f_ext.audit import run
from r2f_ext.audit.inputs import LoadedAdapters, load_adapters
from r2f_ext.audit.phase0 import phase0
from r2f_ext.audit.report import AuditReport
from r2f_ext.audit.run import AuditResult
from r2f_ext.audit.sets import SetReport, set_report
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.audit.write import replacing_report, write_report
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.inversion.gauss_newton import ROUTE
from r2f_ext.inversion.route import Public, adapter_problem
from r2f_ext.inversion.routes import run_routes
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.models import load_base
from r2f_ext.progress import Stages
from r2f_ext.types import BaseModel, LoraUpdate

FASHION_VICTIMS, FACE_VICTIMS = 16, 8
SEARCHED = 4  # victims whose image is searched for by Gauss-Newton, the first ones
JUDGED_ELSEWHERE = f"Not judged here: these are the first {SEARCHED} victims of fashion_mnist."
# Half the pairs of an audit and a quarter of the fitted pairs: figures are a little lower, and minutes are saved.
# Most images that the search finds take no more than six passes.
DEMO = AuditConfig(
    pairs=4000,
    decoder_pairs=1500,
    search=GaussNewtonConfig(passes=6, samples=(1.5,)),
)
# proxy -> set name in the report -> which victims, and how many of them at most
PROXIES: dict[str, dict[str, tuple[str, int | None]]] = {
    "embedded": {"fashion_mnist": ("fashion_mnist", None)},
    "procedural": {"fashion_mnist_procedural": ("fashion_mnist", 8), "lfw": ("lfw", None)},
}


def demo(folder: Path, config: AuditConfig = DEMO, device: str = "cpu", stages: Stages | None = None) -> AuditReport:
    """Train the victims, audit them with both proxies, add Phase 0, write the report into `folder`.

    Raises:
        R2FError: a file cannot be written, or memory does not suffice.
    """
    stages = stages or Stages()
    began = time.perf_counter()
    base = load_base("embedded", device)
    private = {
        "fashion_mnist": load_images("embedded", role="private", count=FASHION_VICTIMS, seed=config.seed),
        "lfw": load_images("lfw", role="private", count=FACE_VICTIMS, seed=config.seed),
    }
    # The victims train on these labels, drawn or not, and each on the image of its own row.
    private = {name: replace(images, labels_known=True, in_order=True) for name, images in private.items()}
    total = FASHION_VICTIMS + FACE_VICTIMS
    with stages.stage("victims", total) as advance:
        loaded, victims = make_victims(base, private, folder / "victims", config.seed)
        advance(total)
    target = loaded.target
    with replacing_report(folder):
        with stages.stage("phase 0"):
            ceiling, _ = phase0(base, private["fashion_mnist"])
        results: dict[str, AuditResult] = {}
        sets: list[SetReport] = []
        for name, parts in PROXIES.items():
            proxy = load_images(name, count=config.pairs, seed=config.seed)
            for victim, _ in parts.values():
                proxy = drop_private(proxy, private[victim])
            shown = {part: _first(private[victim], most) for part, (victim, most) in parts.items()}
            problem = adapter_problem(
                target, [one for victim, most in parts.values() for one in victims[victim][:most]]
            )
            results[name] = run.run_audit_stages(
                problem,
                proxy,
                config,
                Stages(stages.progress, f"{name}: "),
                labels=torch.cat([images.labels for images in shown.values()]),
            )
            sets += _split(results[name], proxy, shown)
        searched, not_run = _searched(results["embedded"], private["fashion_mnist"], victims["fashion_mnist"], stages)
        results["embedded"] = replace(results["embedded"], not_run={**results["embedded"].not_run, **not_run})
        sets += searched
        seconds = {
            **stages.seconds,
            **{f"{name}: {stage}": s for name, result in results.items() for stage, s in result.seconds.items()},
            "total": time.perf_counter() - began,
        }
        report = AuditReport(
            results=results,
            sets=sets,
            notes=tuple(dict.fromkeys(note for result in results.values() for note in result.notes)),
            seconds=seconds,
            phase0=ceiling,
            facts=loaded.facts,
            command=f"r2f demo --out . --seed {config.seed}",
        )
        write_report(folder, report)
    return report


def make_victims(
    base: BaseModel, sets: dict[str, ImageSet], folder: Path, seed: int
) -> tuple[LoadedAdapters, dict[str, list[LoraUpdate]]]:
    """Train and save one adapter per image with PEFT, then read them back as any adapter folder is read.

    Returns:
        (all of them, set name -> their updates).
    """
    folders = {
        name: train_victims(base, images.batch(slice(None)), images.labels, folder / name, VictimConfig(seed=seed))
        for name, images in sets.items()
    }
    loaded = load_adapters([path for paths in folders.values() for path in paths], base)
    remaining = iter(loaded.updates)
    return loaded, {name: [next(remaining) for _ in paths] for name, paths in folders.items()}


def _searched(
    result: AuditResult, private: ImageSet, adapters: list[LoraUpdate], stages: Stages
) -> tuple[list[SetReport], dict[str, str]]:
    """The first SEARCHED victims of an audit by Gauss-Newton, from every image that the package ships.

    Returns:
        (one set with the search and its starts, or none where both failed or the amortised route, which finds the
        labels, did; routes that did not run -> the reason).
    """
    target, first = result.problem.target, slice(0, SEARCHED)
    amortised = [found.take(first) for found in result.reconstructions if found.route == "amortised"]
    if target is None or not amortised:
        return [], {}
    proxy = drop_private(load_images("embedded"), private)
    problem = replace(
        adapter_problem(target, adapters[first]),
        public=Public(proxy),
        found={"amortised": amortised[0]},
        gauss_newton=result.config.search,
    )
    outcome = run_routes(problem, result.verdicts, (ROUTE,), stages)
    not_run = {route: why for route, why in outcome.not_run.items() if route not in problem.found}
    if not outcome.reconstructions:
        return [], not_run
    searched, originals = replace(result, reconstructions=outcome.reconstructions), _first(private, SEARCHED)
    part = set_report("fashion_mnist_searched", searched, proxy, originals, first, not_judged=JUDGED_ELSEWHERE)
    return [part], not_run


def _first(images: ImageSet, most: int | None) -> ImageSet:
    return images.take(torch.arange(len(images))[:most])


def _split(result: AuditResult, proxy: ImageSet, sets: dict[str, ImageSet]) -> list[SetReport]:
    parts, first = [], 0
    for name, private in sets.items():
        parts.append(set_report(name, result, proxy, private, slice(first, first + len(private))))
        first += len(private)
    return parts
