"""What report.json holds, and the page and the terminal show (schema 2). Later versions of the schema only add fields.

Figures are data classes of plain values; `ReportFigures.to_json` converts them to dicts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from r2f_ext.audit.accuracy import Figures
from r2f_ext.audit.base_check import BaseCheck
from r2f_ext.audit.record import Inputs
from r2f_ext.audit.spectra import Spectrum
from r2f_ext.audit.verdict import Comparison, ExactImage
from r2f_ext.config import AuditConfig
from r2f_ext.inversion.exactness import Exactness
from r2f_ext.models import AdapterFacts
from r2f_ext.types import AdaptedLayer

SCHEMA = 2


@dataclass(frozen=True)
class ClosedFormFigures:
    """One closed form on exact gradients: PSNR of n images in dB, and seconds."""

    route: str
    psnr_db_mean: float
    psnr_db_min: float
    seconds: float
    why: str


@dataclass(frozen=True)
class RouteFigures:
    """What one route found for a set of n victims. PSNR, in dB, and SSIM are None where there are no originals.

    Attributes:
        psnr_db, ssim: [n].
        label_accuracy: share of right labels; None where labels are not known or not found.
        exact: [n]; None where the route cannot tell.
        details: figures that belong to all victims together.
        per_victim: name -> [n].
    """

    why: str
    details: dict[str, float]
    per_victim: dict[str, list[float]]
    exact: list[Exactness] | None = None
    label_accuracy: float | None = None
    psnr_db_mean: float | None = None
    psnr_db_std: float | None = None
    psnr_db_median: float | None = None
    ssim_mean: float | None = None
    psnr_db: list[float] | None = None
    ssim: list[float] | None = None


@dataclass(frozen=True)
class SetFigures:
    """One set of n victims.

    Attributes:
        proxy: its name.
        routes: in the order in which they ran.
        controls: control -> mean PSNR in dB; empty without originals.
        control_intervals: control -> how far the judged route lies above it.
        leak, sentences: of the test of the judged route; `verdict` is the first sentence.
        pairing: how victims and private images were brought together; None without originals.
        far_from_proxy: [n], whether an update resembles no proxy update; None where that is not known.
    """

    n: int
    proxy: str
    routes: dict[str, RouteFigures]
    controls: dict[str, float]
    control_intervals: dict[str, Comparison]
    judged_route: str
    leak: bool | None
    verdict: str
    sentences: list[str]
    pairing: str | None
    far_from_proxy: list[bool] | None
    notes: list[str]


@dataclass(frozen=True)
class TargetFigures:
    """What was audited.

    Attributes:
        rank: the largest of the layers that LoRA adapts.
        tokens: of one image.
        identifiable, why: route -> whether the equations suffice for the unknowns, and the count.
    """

    base: str
    rank: int
    layers: list[AdaptedLayer]
    tokens: int
    identifiable: dict[str, bool]
    why: dict[str, str]


@dataclass(frozen=True)
class NotTried:
    """A route that did not run, or failed, and why."""

    route: str
    why: str


@dataclass(frozen=True)
class VerdictFigures:
    """The conclusion over all sets; see `LeakVerdict`.

    Attributes:
        exact: every victim of every route that can tell.
        threat_model: route -> who can use it.
        tried: the routes that ran.
    """

    leak: bool | None
    beyond_control_db: float | None
    interval_db: tuple[float, float] | None
    confidence: float
    p_value: float | None
    judged_route: str
    exact: list[ExactImage]
    threat_model: dict[str, str]
    tried: list[str]
    not_tried: list[NotTried]
    sentences: list[str]


@dataclass(frozen=True)
class PairFigures:
    """The pairs that were made; 0 where that failed."""

    count: int
    per_second: float


@dataclass(frozen=True)
class ProxyFigures:
    """The audit with one proxy. `seconds`: stage -> wall time."""

    decoders: Figures
    pairs: PairFigures
    seconds: dict[str, float]


@dataclass(frozen=True)
class ReportFigures:
    """The whole report.

    Attributes:
        date: when the audit began, UTC, ISO 8601.
        command: the command line; None where there is none.
        failed: what failed -> a sentence on what is missing because of it, and why.
        incomplete: why the audit answers nothing that it was asked for; None where it does.
        versions: package -> version; backend: operator -> its kernel.
        decoders, pairs: of the first proxy.
        reconstruction: set -> its figures.
        seconds: stage -> wall time, and "total".
        proxies: proxy -> its figures.
        spectra: layer -> spectrum of the update.
        inputs: None where the audit is not to be replayed.
        notes: sentences that qualify all figures.
    """

    schema: int
    date: str
    command: str | None
    verdict: VerdictFigures
    failed: dict[str, str]
    incomplete: str | None
    versions: dict[str, str | None]
    backend: dict[str, str]
    target: TargetFigures
    phase0: list[ClosedFormFigures]
    decoders: Figures
    reconstruction: dict[str, SetFigures]
    pairs: PairFigures
    seconds: dict[str, float]
    proxies: dict[str, ProxyFigures]
    spectra: dict[str, Spectrum]
    config: AuditConfig
    inputs: Inputs | None
    base_check: BaseCheck
    notes: list[str]
    adapters: list[AdapterFacts]
    device: str
    lpips: str = "unavailable: its backbone's weights are not shipped"

    def to_json(self) -> dict[str, Any]:
        """The data of report.json: plain dicts, lists, numbers and strings."""
        return asdict(self)
