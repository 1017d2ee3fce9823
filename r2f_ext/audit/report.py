"""The report of an audit: sets of victims beside their originals and controls, and report.json (schema 1).

Later versions of the schema only add fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from r2f_ext.audit.controls import Controls, make_controls
from r2f_ext.audit.inputs import pair_up
from r2f_ext.audit.metrics import Score, psnr_db, score
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.record import Inputs, public_name
from r2f_ext.audit.run import AuditResult
from r2f_ext.capture.tokens import tokens_of
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet
from r2f_ext.env import environment
from r2f_ext.inversion.route import Verdict
from r2f_ext.models import AdapterFacts
from r2f_ext.ops.schemas import SCHEMAS
from r2f_ext.types import Reconstruction, Target

SCHEMA = 1
MIN_GAIN_DB = 0.1  # a smaller gain over the controls that do not need the adapter counts as nothing recovered


@dataclass(frozen=True)
class SetReport:
    """One set of n victims: their originals (if given), their reconstructions by each route, and the controls.

    Attributes:
        name: set name in report.json.
        proxy: name of the proxy that was used.
        count: n.
        reconstructions: one per route; images [n, c, h, w].
        originals: [n, c, h, w], or None where no private images were given.
        labels: [n] true labels, or None.
        controls: None where there are no originals to compare with.
        notes: sentences that qualify the figures.
    """

    name: str
    proxy: str
    count: int
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
        """The conclusion in one sentence."""
        return _verdict(self.scores(), self.control_psnr())

    def to_json(self) -> dict[str, Any]:
        scores, controls = self.scores(), self.control_psnr()
        return {
            "n": self.count,
            "proxy": self.proxy,
            "routes": {r.route: _route_to_json(r, scores.get(r.route), self.labels) for r in self.reconstructions},
            "controls": controls,
            "verdict": _verdict(scores, controls),
            "notes": list(self.notes),
        }


def _verdict(scores: dict[str, Score], controls: dict[str, float]) -> str:
    if not scores:
        return "No private images were given, so nothing is scored; look at the pictures."
    route, best = max(scores.items(), key=lambda item: item[1].psnr_db_mean)
    gain = best.psnr_db_mean - max(controls["shuffled_adapter"], controls["mean_image"])
    if gain < MIN_GAIN_DB:
        return f"Nothing recovered: the best route ({route}) does not beat what is known without this adapter."
    return f"The adapter gave away {gain:.1f} dB beyond what is known without it (best route: {route})."


def _route_to_json(found: Reconstruction, figures: Score | None, labels: Tensor | None) -> dict[str, Any]:
    unscored = {"psnr_db_mean": None, "psnr_db_std": None, "ssim_mean": None}
    right = None
    if labels is not None and found.labels is not None:
        right = float((found.labels.cpu() == labels).float().mean())
    return {
        **(unscored if figures is None else asdict(figures)),
        "label_accuracy": right,
        "why": found.why,
        "details": found.details,
        "per_victim": {name: values.tolist() for name, values in found.per_victim.items()},
    }


def set_report(
    name: str, result: AuditResult, proxy: ImageSet, private: ImageSet | None, rows: slice = slice(None)
) -> SetReport:
    """Select the victims `rows` of an audit and compare them with their originals.

    Args:
        private: at least as many images as victims, see `pair_up`; None: nothing is scored.
    """
    parts = [found.take(rows) for found in result.reconstructions]
    notes = _far_from_proxy(result.far_from_proxy[rows])
    estimate = result.estimate[rows]
    if private is None:
        return SetReport(name, proxy.name, len(estimate), parts, None, None, None, notes)
    pairing = pair_up(private, estimate)
    paired = pairing.originals
    notes += (pairing.sentence,)
    # Shuffled control: each victim gets the reconstruction from another victim's adapter.
    shuffled = estimate.roll(1, 0) if len(estimate) > 1 else result.stranger
    controls = make_controls(proxy, paired.labels, estimate, shuffled)
    originals = paired.batch(slice(None))
    return SetReport(name, proxy.name, len(estimate), parts, originals, paired.labels, controls, notes)


def _far_from_proxy(far: Tensor) -> tuple[str, ...]:
    count = int(far.sum())
    if count == 0:
        return ()
    return (f"{count} of {len(far)} updates lie far from every proxy update: the proxy may not fit this data.",)


@dataclass(frozen=True)
class AuditReport:
    """The results of an audit and the inputs needed to repeat it.

    Attributes:
        target: base and adapted layers.
        verdicts: route -> whether the equations suffice, and why.
        results: proxy name -> audit with that proxy; the figures of the first one stand at the top level of the JSON.
        sets: the victims, set by set.
        config: sizes and seeds that ran, after they were fitted to memory.
        seconds: stage -> wall time, and "total".
        inputs: what was audited, with paths relative to the report's folder; None where it is not to be replayed.
        notes: sentences on routes that were refused and on the proxy.
        phase0: closed forms on exact gradients, for comparison.
        facts: what the adapters' folders say beside their factors, one per adapter.
    """

    target: Target
    verdicts: dict[str, Verdict]
    results: dict[str, AuditResult]
    sets: list[SetReport]
    config: AuditConfig
    seconds: dict[str, float]
    inputs: Inputs | None = None
    notes: tuple[str, ...] = ()
    phase0: Sequence[Phase0Report] = ()
    facts: tuple[AdapterFacts, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The data of report.json: plain dicts, lists, numbers and strings."""
        first = next(iter(self.results.values()))
        information = environment()
        device = self.target.base.device.type
        return {
            "schema": SCHEMA,
            "versions": information["versions"],
            "backend": {op: information["backends"][op][device] for op in SCHEMAS},
            "target": target_to_json(self.target, self.verdicts),
            "phase0": [figures.to_json() for figures in self.phase0],
            "decoders": first.decoders,
            "reconstruction": {part.name: part.to_json() for part in self.sets},
            "pairs": _pairs_to_json(first),
            "seconds": self.seconds,
            "proxies": {
                name: {"decoders": result.decoders, "pairs": _pairs_to_json(result), "seconds": result.seconds}
                for name, result in self.results.items()
            },
            "config": asdict(self.config),
            "inputs": None if self.inputs is None else asdict(self.inputs),
            "notes": list(self.notes),
            "adapters": [asdict(one) for one in self.facts],
            "device": device if information["cuda_device"] is None else information["cuda_device"],
            "lpips": "unavailable: its backbone's weights are not shipped",
        }


def target_to_json(target: Target, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """Base, rank, layers and tokens of the adapter, and the verdict of every route."""
    return {
        "base": public_name(target.base.spec),
        "rank": max(layer.rank for layer in target.layers),
        "layers": [asdict(layer) for layer in target.layers],
        "tokens": tokens_of(target.base),
        "identifiable": {route: verdict.identifiable for route, verdict in verdicts.items()},
        "why": {route: verdict.why for route, verdict in verdicts.items()},
    }


def _pairs_to_json(result: AuditResult) -> dict[str, Any]:
    return {"count": result.pair_count, "per_second": result.pairs_per_second}
