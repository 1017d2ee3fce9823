"""`r2f demo`: sixteen and eight real victims, made and audited from nothing but what the package ships."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from r2f_ext.audit.figures import write_reconstructions
from r2f_ext.audit.html import write_html
from r2f_ext.audit.phase0 import run_phase0
from r2f_ext.audit.report import SetReport, build_report, set_report, write_report
from r2f_ext.audit.run import AuditResult, run_audit_stages
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.files import write_tensors
from r2f_ext.inversion.route import Verdict
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.progress import Stages
from r2f_ext.types import BaseModel, LoraUpdate, Target

FASHION_VICTIMS, FACE_VICTIMS = 16, 8


@dataclass(frozen=True)
class Finished:
    """A written report: the data of report.json, its sets, and where the files are."""

    folder: Path
    report: dict[str, Any]
    sets: list[SetReport]


def demo(folder: Path, config: AuditConfig, device: str = "cpu", stages: Stages | None = None) -> Finished:
    """Make the victims, audit them with both proxies, add Phase 0, write the report into `folder`."""
    stages = stages or Stages()
    began = time.perf_counter()
    base = load_base("embedded", device)
    fashion = load_images("embedded", role="private", count=FASHION_VICTIMS, seed=config.seed)
    faces = load_images("lfw", role="private", count=FACE_VICTIMS, seed=config.seed)
    with stages.stage("victims", len(fashion) + len(faces)) as advance:
        target, victims = make_victims(base, {"fashion_mnist": fashion, "lfw": faces}, folder / "victims", config)
        advance(len(fashion) + len(faces))
    with stages.stage("phase 0"):
        ceiling, _ = run_phase0(base, fashion)
        figures, pictures = [one.to_json() for one in ceiling], [(one.route, one.images) for one in ceiling]
    results: dict[str, AuditResult] = {}
    sets: list[SetReport] = []
    for proxy_name, set_names in (
        ("embedded", {"fashion_mnist": fashion}),
        ("procedural", {"fashion_mnist_procedural": fashion, "lfw": faces}),
    ):
        proxy = load_images(proxy_name, count=config.pairs, seed=config.seed)
        for private in set_names.values():
            proxy = drop_private(proxy, private)
        adapters = [a for name in set_names for a in victims[name.removesuffix("_procedural")]]
        results[proxy_name] = run_audit_stages(
            target, adapters, proxy, config, Stages(stages.progress, f"{proxy_name}: ")
        )
        write_tensors(
            folder / f"gradients_{proxy_name}.safetensors",
            results[proxy_name].decoded.dense,
            {"unit": "the victims' learning rate", "victims": ", ".join(set_names)},
        )
        sets += _split(results[proxy_name], proxy, set_names)
    verdicts = results["embedded"].verdicts
    seconds = {
        **stages.seconds,
        **{f"{name}: {stage}": s for name, result in results.items() for stage, s in result.seconds.items()},
        "total": time.perf_counter() - began,
    }
    return finish(folder, target, verdicts, results, sets, figures, pictures, config, seconds)


def make_victims(
    base: BaseModel, sets: dict[str, ImageSet], folder: Path, config: AuditConfig
) -> tuple[Target, dict[str, list[LoraUpdate]]]:
    """Train and save one adapter an image with PEFT, then read them back as any adapter folder is read."""
    victims: dict[str, list[LoraUpdate]] = {}
    target: Target | None = None
    for name, images in sets.items():
        labels = images.labels
        folders = train_victims(base, images.batch(slice(None)), labels, folder / name, VictimConfig(seed=config.seed))
        victims[name] = []
        for path in folders:
            target, update = attach(read_adapter(path), base)
            victims[name].append(update)
    assert target is not None
    return target, victims


def _split(result: AuditResult, proxy: ImageSet, sets: dict[str, ImageSet]) -> list[SetReport]:
    parts, first = [], 0
    for name, private in sets.items():
        parts.append(set_report(name, result, proxy, private, slice(first, first + len(private))))
        first += len(private)
    return parts


def finish(
    folder: Path,
    target: Target,
    verdicts: dict[str, Verdict],
    results: dict[str, AuditResult],
    sets: list[SetReport],
    figures: list[dict[str, Any]],
    pictures: list[tuple[str, Tensor]],
    config: AuditConfig,
    seconds: dict[str, float],
) -> Finished:
    """Write report.json, report.html and reconstructions.png."""
    report = build_report(target, verdicts, results, sets, figures, config, seconds)
    write_report(folder, report)
    write_html(folder / "report.html", report, sets, pictures)
    write_reconstructions(folder / "reconstructions.png", sets, pictures)
    return Finished(folder, report, sets)
