"""The report of an audit: sets of victims beside their originals and controls, and report.json (schema 2).

Later versions of the schema only add fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from r2f_ext.audit.accuracy import Figures
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.record import Inputs, public_name
from r2f_ext.audit.run import LATER, AuditResult
from r2f_ext.audit.sets import SetReport
from r2f_ext.audit.spectra import spectra_of
from r2f_ext.audit.verdict import JUDGED_ROUTE, LeakVerdict, conclude
from r2f_ext.capture.tokens import tokens_of
from r2f_ext.env import environment
from r2f_ext.inversion.route import Verdict
from r2f_ext.inversion.routes import refusals, registry
from r2f_ext.models import AdapterFacts
from r2f_ext.ops.schemas import SCHEMAS
from r2f_ext.types import Target

SCHEMA = 2
NOT_ASKED = "Not asked for: name it with --routes."
LOADED_IF_ASKED = (*LATER, "public")  # what a problem lacks without being the reason why a route did not run


@dataclass(frozen=True)
class AuditReport:
    """The results of an audit and the inputs needed to repeat it.

    Attributes:
        results: proxy name -> audit with that proxy; the figures of the first one stand at the top level of the JSON.
        sets: the victims, set by set.
        seconds: stage -> wall time, and "total".
        inputs: what was audited, with paths relative to the report's folder; None where it is not to be replayed.
        notes: sentences on routes that were refused and on the proxy.
        phase0: closed forms on exact gradients, for comparison.
        facts: what the adapters' folders say beside their factors, one per adapter.
        date: when the audit began, UTC, ISO 8601.
        command: the command line, with paths as in `inputs`; None where there is none. See `command_of`.
    """

    results: dict[str, AuditResult]
    sets: list[SetReport]
    seconds: dict[str, float]
    inputs: Inputs | None = None
    notes: tuple[str, ...] = ()
    phase0: Sequence[Phase0Report] = ()
    facts: tuple[AdapterFacts, ...] = ()
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    command: str | None = None

    @property
    def first(self) -> AuditResult:
        """The audit with the first proxy."""
        return next(iter(self.results.values()))

    @property
    def tried(self) -> list[str]:
        """The routes that ran, in the order of the registry."""
        ran = {found.route for part in self.sets for found in part.reconstructions}
        return [route for route in registry() if route in ran]

    @property
    def not_tried(self) -> dict[str, str]:
        """Every other route -> why it did not run, or failed."""
        reasons: dict[str, str] = {}
        for result in self.results.values():
            reasons |= refusals(result.problem, result.verdicts, later=LOADED_IF_ASKED) | result.not_run
        tried = self.tried
        return {route: reasons.get(route, NOT_ASKED) for route in registry() if route not in tried}

    @property
    def failed(self) -> dict[str, str]:
        """What failed -> a sentence on what is missing because of it, and why; see `AuditResult.failed`."""
        several = len(self.results) > 1
        return {
            f"{proxy}: {name}" if several else name: why
            for proxy, result in self.results.items()
            for name, why in result.failed.items()
        }

    @property
    def incomplete(self) -> str | None:
        """One sentence on why the audit answers nothing that it was asked for; None if it does answer.

        A stage that the verdict rests on failed, or every route did, and no image was recovered exactly.
        """
        if self.verdict().leak is not None:
            return None
        scored = any(part.originals is not None for part in self.sets)
        needed = ("pairs", "estimates", *(("controls",) if scored else ()))
        culprits = [why for result in self.results.values() for name, why in result.failed.items() if name in needed]
        if culprits:
            return f"the report is incomplete: {culprits[0][:1].lower()}{culprits[0][1:]}"
        return None if self.tried else "the report is incomplete: no route ran to its end, see the reasons in it."

    def verdict(self) -> LeakVerdict:
        """The conclusion over all sets."""
        exact = [one for part in self.sets for one in part.exact()]
        return conclude({part.name: part.judgement for part in self.sets}, exact)

    def to_json(self) -> dict[str, Any]:
        """The data of report.json: plain dicts, lists, numbers and strings."""
        first = self.first
        target, adapters = first.problem.target, first.problem.adapters
        assert target is not None and adapters is not None
        information = environment()
        device = target.base.device.type
        return {
            "schema": SCHEMA,
            "date": self.date,
            "command": self.command,
            "verdict": self._verdict_to_json(),
            "failed": self.failed,
            "incomplete": self.incomplete,
            "versions": information["versions"],
            "backend": {op: information["backends"][op][device] for op in SCHEMAS},
            "target": target_to_json(target, first.verdicts),
            "phase0": [figures.to_json() for figures in self.phase0],
            "decoders": self._decoders_to_json(next(iter(self.results))),
            "reconstruction": {part.name: part.to_json() for part in self.sets},
            "pairs": _pairs_to_json(first),
            "seconds": self.seconds,
            "proxies": {
                name: {
                    "decoders": self._decoders_to_json(name),
                    "pairs": _pairs_to_json(result),
                    "seconds": result.seconds,
                }
                for name, result in self.results.items()
            },
            "spectra": {layer: asdict(one) for layer, one in spectra_of(target.without_saved(), adapters).items()},
            "config": asdict(first.config),
            "inputs": None if self.inputs is None else asdict(self.inputs),
            "base_check": first.base_check.to_json(),
            "notes": list(self.notes),
            "adapters": [asdict(one) for one in self.facts],
            "device": device if information["cuda_device"] is None else information["cuda_device"],
            "lpips": "unavailable: its backbone's weights are not shipped",
        }

    def _verdict_to_json(self) -> dict[str, Any]:
        found = self.verdict()
        tried, not_tried, routes = self.tried, self.not_tried, registry()
        return {
            "leak": found.leak,
            "beyond_control_db": found.beyond_control_db,
            "interval_db": found.interval_db,
            "confidence": found.confidence,
            "p_value": found.p_value,
            "judged_route": JUDGED_ROUTE,
            "exact": [asdict(one) for part in self.sets for one in part.exact()],
            "threat_model": {route: routes[route].threat_model for route in (*tried, *not_tried)},
            "tried": tried,
            "not_tried": [{"route": route, "why": why} for route, why in not_tried.items()],
            "sentences": list(found.sentences),
        }

    def _decoders_to_json(self, proxy: str) -> Figures:
        """The decoders' figures with one proxy, and the victims' true cosine over all its sets."""
        parts = [part.true_cosines for part in self.sets if part.proxy == proxy and part.true_cosines]
        figures: Figures = {}
        for layer, kinds in self.results[proxy].decoders.items():
            figures[layer] = {}
            for kind, values in kinds.items():
                true = [part[layer][kind] for part in parts if kind in part.get(layer, {})]
                figures[layer][kind] = {**values, "victim_true": float(torch.cat(true).mean()) if true else None}
        return figures


def target_to_json(target: Target, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    """Base, rank, layers and tokens of the adapter, and the verdict of every route."""
    return {
        "base": public_name(target.base.spec),
        "rank": max((layer.rank for layer in target.layers if not layer.saved), default=0),
        "layers": [asdict(layer) for layer in target.layers],
        "tokens": tokens_of(target.base),
        "identifiable": {route: verdict.identifiable for route, verdict in verdicts.items()},
        "why": {route: verdict.why for route, verdict in verdicts.items()},
    }


def _pairs_to_json(result: AuditResult) -> dict[str, Any]:
    return {"count": result.pair_count, "per_second": result.pairs_per_second}
