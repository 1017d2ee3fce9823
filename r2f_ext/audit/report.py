"""report.json (schema 1): the figures of an audit; later versions only add."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from r2f_ext.audit.controls import Controls, make_controls
from r2f_ext.audit.metrics import Score, psnr_db, score
from r2f_ext.audit.run import AuditResult
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.env import environment
from r2f_ext.files import write_text
from r2f_ext.inversion.geometry import vit_geometry
from r2f_ext.inversion.route import Verdict
from r2f_ext.ops.schemas import SCHEMAS
from r2f_ext.types import Reconstruction, Target

SCHEMA = 1
MIN_GAIN_DB = 0.1  # less than this over what is known anyway is called nothing


@dataclass(frozen=True)
class SetReport:
    """One set of victims: their originals (if given), what each route made of them, and the controls.

    Attributes:
        name: set name in report.json.
        proxy: name of the proxy that was used.
        reconstructions: images [n, c, h, w] a route.
        originals: [n, c, h, w], or None where no private images were given.
        labels: [n] true labels, or None.
        controls: None where there are no originals to compare with.
        notes: sentences that a reader of the figures must know.
    """

    name: str
    proxy: str
    reconstructions: list[Reconstruction]
    originals: Tensor | None
    labels: Tensor | None
    controls: Controls | None
    notes: tuple[str, ...] = ()

    def scores(self) -> dict[str, Score]:
        """route -> figures; empty without originals."""
        if self.originals is None:
            return {}
        return {r.route: score(r.images.cpu(), self.originals) for r in self.reconstructions}

    def control_psnr(self) -> dict[str, float]:
        """control -> mean PSNR in dB; empty without originals."""
        if self.originals is None or self.controls is None:
            return {}
        return {name: float(psnr_db(image, self.originals).mean()) for name, image in self.controls.items().items()}

    def verdict(self) -> str:
        """One sentence for a person."""
        scores, controls = self.scores(), self.control_psnr()
        if not scores:
            return "No private images were given, so nothing is scored; look at the pictures."
        route, best = max(scores.items(), key=lambda item: item[1].psnr_db_mean)
        prior = max(controls["shuffled_adapter"], controls["mean_image"])
        gain = best.psnr_db_mean - prior
        if gain < MIN_GAIN_DB:
            return f"Nothing recovered: the best route ({route}) does not beat what is known without this adapter."
        return f"The adapter gave away {gain:.1f} dB beyond what is known without it (best route: {route})."


def set_report(
    name: str, result: AuditResult, proxy: ImageSet, private: ImageSet | None, rows: slice = slice(None)
) -> SetReport:
    """Take the victims `rows` out of an audit and put them beside their originals (in the same order)."""
    parts = [r.take(rows) for r in result.reconstructions]
    amortised = next(r for r in parts if r.route == "amortised")
    notes = _proxy_warning(result.far_from_proxy[rows])
    if private is None:
        return SetReport(name, proxy.name, parts, None, None, None, notes)
    labels = private.labels
    # Another victim of the same set for each: what the route makes of any adapter.
    shuffled = amortised.images.roll(1, 0) if len(amortised.images) > 1 else result.stranger
    controls = make_controls(proxy, labels, amortised.images, shuffled)
    return SetReport(name, proxy.name, parts, private.batch(slice(None)), labels, controls, notes)


def _proxy_warning(far: Tensor) -> tuple[str, ...]:
    count = int(far.sum())
    if count == 0:
        return ()
    return (f"{count} of {len(far)} updates lie far from every proxy update: the proxy may not fit this data.",)


def build_report(
    target: Target,
    verdicts: dict[str, Verdict],
    results: dict[str, AuditResult],
    sets: list[SetReport],
    phase0: list[dict[str, Any]],
    config: AuditConfig,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The report as plain data.

    Args:
        results: proxy name -> audit with that proxy; the first one's decoders and pairs stand at the top level.
        phase0: [{route, psnr_db_mean, seconds, ...}].
    """
    first = next(iter(results.values()))
    information = environment()
    device = target.base.device.type
    return {
        "schema": SCHEMA,
        "versions": information["versions"],
        "backend": {op: information["backends"][op][device] for op in SCHEMAS},
        "target": target_figures(target, verdicts),
        "phase0": phase0,
        "decoders": first.decoders,
        "reconstruction": {part.name: _set_figures(part) for part in sets},
        "pairs": {"count": first.pair_count, "per_second": first.pairs_per_second},
        "seconds": seconds,
        "proxies": {
            name: {
                "decoders": result.decoders,
                "pairs": {"count": result.pair_count, "per_second": result.pairs_per_second},
                "seconds": result.seconds,
            }
            for name, result in results.items()
        },
        "config": asdict(config),
        "device": device if information["cuda_device"] is None else information["cuda_device"],
        "lpips": "unavailable: its backbone's weights are not shipped",
    }


def target_figures(target: Target, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """What was found in the adapter and which routes can work."""
    return {
        "base": target.base.spec,
        "rank": max(layer.rank for layer in target.layers),
        "layers": [asdict(layer) for layer in target.layers],
        "tokens": vit_geometry(target.base.model).tokens,
        "identifiable": {route: verdict.identifiable for route, verdict in verdicts.items()},
        "why": {route: verdict.why for route, verdict in verdicts.items()},
    }


def _set_figures(part: SetReport) -> dict[str, Any]:
    scores = part.scores()
    return {
        "n": len(part.reconstructions[0].images),
        "proxy": part.proxy,
        "routes": {
            r.route: {
                **(
                    asdict(scores[r.route])
                    if scores
                    else {"psnr_db_mean": None, "psnr_db_std": None, "ssim_mean": None}
                ),
                "label_accuracy": _label_accuracy(r, part.labels),
                "why": r.why,
                "details": r.details,
            }
            for r in part.reconstructions
        },
        "controls": part.control_psnr(),
        "verdict": part.verdict(),
        "notes": list(part.notes),
    }


def _label_accuracy(reconstruction: Reconstruction, labels: Tensor | None) -> float | None:
    if labels is None or reconstruction.labels is None:
        return None
    return float((reconstruction.labels.cpu() == labels).float().mean())


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Write report.json."""
    write_text(folder / "report.json", json.dumps(report, indent=1))
    return folder / "report.json"
