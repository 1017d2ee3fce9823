"""The report of an audit: sets of victims beside their originals and controls; see `schema` for what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import torch

from r2f_ext.audit.accuracy import Figures
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.record import Inputs, public_name
from r2f_ext.audit.run import LATER, AuditResult
from r2f_ext.audit.schema import (
    SCHEMA,
    NotTried,
    PairFigures,
    ProxyFigures,
    ReportFigures,
    TargetFigures,
    VerdictFigures,
)
from r2f_ext.audit.sets import SetReport
from r2f_ext.audit.spectra import spectra_of
from r2f_ext.audit.verdict import JUDGED_ROUTE, ExactImage, LeakVerdict, conclude
from r2f_ext.capture.tokens import tokens_of
from r2f_ext.env import environment
from r2f_ext.inversion.route import Verdict
from r2f_ext.inversion.routes import refusals, registry
from r2f_ext.models import AdapterFacts
from r2f_ext.ops.schemas import SCHEMAS
from r2f_ext.types import Target

NOT_ASKED = "Not asked for: name it with --routes."
# Fields that are made or loaded only for routes that run: if a problem lacks them, that is not why a route did not run.
LOADED_IF_ASKED = (*LATER, "public")


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
        if self.verdict.leak is not None:
            return None
        scored = any(part.originals is not None for part in self.sets)
        needed = ("pairs", "estimates", *(("controls",) if scored else ()))
        culprits = [why for result in self.results.values() for name, why in result.failed.items() if name in needed]
        if culprits:
            return f"the report is incomplete: {culprits[0][:1].lower()}{culprits[0][1:]}"
        return None if self.tried else "the report is incomplete: no route ran to its end, see the reasons in it."

    @cached_property
    def exact(self) -> list[ExactImage]:
        """Every victim of every route that can be exact."""
        return [one for part in self.sets for one in part.exact()]

    @cached_property
    def verdict(self) -> LeakVerdict:
        """The conclusion over all sets."""
        return conclude({part.name: part.judgement for part in self.sets}, self.exact)

    @cached_property
    def figures(self) -> ReportFigures:
        """What report.json holds, computed once."""
        first = self.first
        target, adapters = first.problem.target, first.problem.adapters
        assert target is not None and adapters is not None
        information, device = environment(), target.base.device.type
        return ReportFigures(
            schema=SCHEMA,
            date=self.date,
            command=self.command,
            verdict=self._verdict_figures(),
            failed=self.failed,
            incomplete=self.incomplete,
            versions=information["versions"],
            backend={op: information["backends"][op][device] for op in SCHEMAS},
            target=target_figures(target, first.verdicts),
            phase0=[one.figures for one in self.phase0],
            decoders=self._decoders(next(iter(self.results))),
            reconstruction={part.name: part.figures for part in self.sets},
            pairs=_pair_figures(first),
            seconds=self.seconds,
            proxies={
                name: ProxyFigures(self._decoders(name), _pair_figures(result), result.seconds)
                for name, result in self.results.items()
            },
            spectra=spectra_of(target.without_saved(), adapters),
            config=first.config,
            inputs=self.inputs,
            base_check=first.base_check,
            notes=list(self.notes),
            adapters=list(self.facts),
            device=device if information["cuda_device"] is None else information["cuda_device"],
        )

    def to_json(self) -> dict[str, Any]:
        """The data of report.json: plain dicts, lists, numbers and strings."""
        return self.figures.to_json()

    def _verdict_figures(self) -> VerdictFigures:
        found, tried, not_tried, routes = self.verdict, self.tried, self.not_tried, registry()
        return VerdictFigures(
            leak=found.leak,
            beyond_control_db=found.beyond_control_db,
            interval_db=found.interval_db,
            confidence=found.confidence,
            p_value=found.p_value,
            judged_route=JUDGED_ROUTE,
            exact=self.exact,
            threat_model={route: routes[route].threat_model for route in (*tried, *not_tried)},
            tried=tried,
            not_tried=[NotTried(route, why) for route, why in not_tried.items()],
            sentences=list(found.sentences),
        )

    def _decoders(self, proxy: str) -> Figures:
        """The decoders' figures with one proxy, and the victims' true cosine over all its sets."""
        parts = [part.true_cosines for part in self.sets if part.proxy == proxy and part.true_cosines]
        figures: Figures = {}
        for layer, kinds in self.results[proxy].decoders.items():
            figures[layer] = {}
            for kind, values in kinds.items():
                true = [part[layer][kind] for part in parts if kind in part.get(layer, {})]
                figures[layer][kind] = replace(values, victim_true=float(torch.cat(true).mean()) if true else None)
        return figures


def target_figures(target: Target, verdicts: dict[str, Verdict]) -> TargetFigures:
    """Base, rank, layers and tokens of the adapter, and the verdict of every route."""
    return TargetFigures(
        base=public_name(target.base.spec),
        rank=max((layer.rank for layer in target.layers if not layer.saved), default=0),
        layers=list(target.layers),
        tokens=tokens_of(target.base),
        identifiable={route: verdict.identifiable for route, verdict in verdicts.items()},
        why={route: verdict.why for route, verdict in verdicts.items()},
    )


def _pair_figures(result: AuditResult) -> PairFigures:
    return PairFigures(result.pair_count, result.pairs_per_second)
