"""The interface of a route: a method that reconstructs images, and a verdict that is available before it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from r2f_ext.data import ImageSet, ProxyImages
from r2f_ext.decoders import stack_updates
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.geometry import PATCH_WEIGHT, POSITIONS, measured_tokens, structural_tokens
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.matrix_free import MatrixFreeConfig
from r2f_ext.inversion.saved_searches import SavedSearches
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.unet import UNetConfig
from r2f_ext.models import AdapterFacts, Evidence, InitialFactors, common_a, evidence_of
from r2f_ext.pairs import Training
from r2f_ext.progress import Advance
from r2f_ext.types import BaseModel, Gradient, LoraUpdate, Reconstruction, Target

PriorGradient = Callable[[Tensor, int], Tensor]  # images [n, c, h, w] and step -> a gradient on them


class Certainty(StrEnum):
    """The result of counting equations and unknowns for a route."""

    EXACT = "exact by count"
    PLAUSIBLE = "plausible"
    REFUSED = "refused"


@dataclass(frozen=True)
class Verdict:
    """Whether a route can recover an image, decided before it runs.

    Attributes:
        route: name in the registry.
        certainty: EXACT: a linear solve gives the image. PLAUSIBLE: the route is a search or an estimate; enough
            equations determine the image but do not guarantee that the route finds it. REFUSED: not run.
        unknowns: number of unknowns, per independent linear system for the closed forms, per group otherwise.
        equations: number of observed values that constrain them.
        why: one sentence with the count.
    """

    route: str
    certainty: Certainty
    unknowns: int
    equations: int
    why: str

    @property
    def identifiable(self) -> bool:
        """Whether the route applies and its equations suffice for the unknowns."""
        return self.certainty is not Certainty.REFUSED and self.equations >= self.unknowns


@dataclass(frozen=True)
class Proxies:
    """Proxy victims that started from the audited adapters' A.

    Attributes:
        updates: name -> [N, d_out * r].
        images: [N, c, h, w] in [0, 1], one per update.
        labels: [N] int64.
        num_classes: width of the head.
    """

    updates: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    num_classes: int

    @cached_property
    def ridge(self) -> AmortisedInverter:
        """Kernel ridge from updates to images, fitted on first use and cached.

        Raises:
            R2FError: fewer than 20 proxies.
        """
        return AmortisedInverter(self.updates, self.images, self.labels, self.num_classes)


@dataclass(frozen=True)
class Public:
    """All public images, of which the proxies are usually a part.

    Attributes:
        images: none of them is private.
        generated: more images, for any label, that are made when they are needed; None: there are none.
        private: uint8 [n, c, h, w], not used even if generated or made as variants; None: not known.
        most: images of one label whose pairs fit into memory; None: all.
        precision: of the model when pairs are made of them (see `GeneratedPairs`).
    """

    images: ImageSet
    generated: ProxyImages | None = None
    private: Tensor | None = None
    most: int | None = None
    precision: str = "float32"

    @property
    def fingerprint(self) -> tuple[str, str]:
        """Of the images, and of those that are generated."""
        return self.images.fingerprint, "" if self.generated is None else self.generated.fingerprint


@dataclass(frozen=True)
class Problem:
    """The input of a route. A field that is None was not observed or is unknown.

    Attributes:
        base: the public base model.
        target: its adapted layers; None where exact gradients are observed and no adapter.
        shared: names of the parameters whose exact gradients are observed; None: of all.
        steps: the victims' steps T; None: unknown.
        batch: images of one group, b.
        gradients: exact gradients of V groups, parameter name -> gradient of the parameter's shape.
        adapters: the factors of V victims.
        known_labels: the label of each victim [V] where its saved head tells it, else -1; None: no head tells any.
        observed: name -> their updates -B [V, d_out, r].
        a: name -> the common A of the victims and the proxies [r, d_in].
        initial: looks up A before the first step (A_0).
        training: the victims' recipe.
        proxies: proxy updates with their images and labels.
        public: all public images, where these are more than the proxies or serve every label; else None.
        decoded: name -> the victims' decoded gradients [V, d_out, d_in].
        found: route -> reconstruction, for routes that have already run.
        matching, refinement: configurations of the two gradient matching routes.
        gauss_newton, matrix_free: configurations of the searches.
        unet: configuration of the U-Net that refines the amortised estimate; None: kernel ridge alone.
        prior: (images, step) -> gradient [n, c, h, w] of a learned prior, added while matching.
        facts: what the adapters' folders say beside their factors, one per adapter.
        evidence: what the adapters' factors show of the training; None without adapters.
        saved: where searches that have ended are kept until all have; None: nowhere.
    """

    base: BaseModel
    target: Target | None = None
    shared: Collection[str] | None = None
    steps: int | None = None
    batch: int = 1
    gradients: list[dict[str, Tensor]] | None = None
    adapters: list[LoraUpdate] | None = None
    known_labels: Tensor | None = None
    observed: dict[str, Tensor] | None = None
    a: dict[str, Tensor] | None = None
    initial: InitialFactors | None = None
    training: Training | None = None
    proxies: Proxies | None = None
    public: Public | None = None
    decoded: Gradient | None = None
    found: Mapping[str, Reconstruction] = field(default_factory=dict)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    refinement: MatchingConfig = field(default_factory=MatchingConfig)
    gauss_newton: GaussNewtonConfig = field(default_factory=GaussNewtonConfig)
    matrix_free: MatrixFreeConfig = field(default_factory=MatrixFreeConfig)
    unet: UNetConfig | None = None
    prior: PriorGradient | None = None
    facts: tuple[AdapterFacts, ...] = ()
    evidence: Evidence | None = None
    saved: SavedSearches | None = None

    @cached_property
    def effective_tokens(self) -> dict[str, int]:
        """Adapted layer, or linear layer where there is no target -> tokens of one image that its gradient holds."""
        if self.target is not None and self.base.device.type != "meta" and self.base.num_classes:
            return measured_tokens(self.target)
        linear = [name for name, module in self.base.model.named_modules() if isinstance(module, nn.Linear)]
        return structural_tokens(self.base, linear if self.target is None else self.target.names)

    @property
    def victims(self) -> int:
        """V: number of groups whose images are reconstructed."""
        return len(self.adapters or self.gradients or ())


def adapter_problem(
    target: Target,
    adapters: list[LoraUpdate],
    initial: InitialFactors | None = None,
    facts: tuple[AdapterFacts, ...] = (),
) -> Problem:
    """The problem given by adapters with a common A_0; callers add proxies and decoded gradients with `replace`.

    Args:
        initial: source of A_0; None: common seeds are tried.
        facts: what the adapters' folders say beside their factors.

    Raises:
        R2FError: the adapters have different initial A's, or `initial` names an A_0 that is not theirs.
    """
    initial = initial or InitialFactors(target, adapters[0])
    a = common_a(adapters)
    if initial.named and initial.found is not None:  # a wrong folder or seed is refused even where no route needs A_0
        adapters = [replace(one, a0=initial.found.a) for one in adapters]
        a = common_a(adapters)
    evidence = evidence_of([one.without_saved() for one in adapters], facts)
    gradients = _saved_gradients(adapters)
    return Problem(
        target.base,
        target,
        shared=None if gradients is None else set.intersection(*(set(one) for one in gradients)),
        steps=evidence.steps,
        adapters=adapters,
        gradients=gradients,
        known_labels=_known_labels(adapters, target.base.device),
        observed=stack_updates(adapters),
        a=a,
        initial=initial,
        facts=facts,
        evidence=evidence,
    )


def _known_labels(adapters: list[LoraUpdate], device: torch.device) -> Tensor | None:
    labels = [-1 if one.label is None else one.label for one in adapters]
    return torch.tensor(labels, device=device) if max(labels) >= 0 else None


def _saved_gradients(adapters: list[LoraUpdate]) -> list[dict[str, Tensor]] | None:
    """The gradients that whole saved parameters show, where they include those that a closed form reads."""
    needed = {PATCH_WEIGHT, POSITIONS}
    return [one.gradients for one in adapters] if all(needed <= one.gradients.keys() for one in adapters) else None


class Route(ABC):
    """A reconstruction method. Subclasses in modules of `r2f_ext.inversion.routes` are registered automatically.

    Attributes:
        name: unique; also the name in report.json.
        title: label of its row in pictures; None: the name.
        reads: fields of Problem that must not be None.
        after: routes whose reconstructions it reads from `Problem.found`. Those of them that can run do so first, and
            the route needs at least one of them.
        by_default: whether the route runs if no routes are named.
        threat_model: one sentence: who can use the route, and what they must know.
    """

    name: ClassVar[str]
    threat_model: ClassVar[str]
    title: ClassVar[str | None] = None
    reads: ClassVar[tuple[str, ...]]
    after: ClassVar[tuple[str, ...]] = ()
    by_default: ClassVar[bool] = True

    @abstractmethod
    def verdict(self, problem: Problem) -> Verdict:
        """Count unknowns and equations. Requires only `base`, `target`, `shared`, `steps` and `batch`."""

    @abstractmethod
    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        """Reconstruct the images of V victims.

        Requires all of `reads`, one of `after`, and a verdict other than REFUSED.

        Args:
            advance: called with the number of completed units, which sum to `units`.
        """

    def units(self, problem: Problem) -> int:
        """Number of work units that `run` reports through `advance`."""
        return problem.victims

    def lacking(self, problem: Problem, later: Collection[str] = ()) -> str | None:
        """The first field of `reads` that the problem does not have."""
        return next((name for name in self.reads if name not in later and getattr(problem, name) is None), None)
