"""What a route is: a way from an observation to images, with a verdict that is given before it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from r2f_ext.decoders import stack_updates
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.gauss_newton import GaussNewtonConfig
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.matrix_free import MatrixFreeConfig
from r2f_ext.inversion.unet import UNetConfig
from r2f_ext.models import InitialFactors, common_a, untouched_a
from r2f_ext.pairs import Training
from r2f_ext.progress import Advance
from r2f_ext.types import BaseModel, Gradient, LoraUpdate, Reconstruction, Target

PriorGradient = Callable[[Tensor, int], Tensor]  # images [n, c, h, w] and step -> a gradient on them


class Certainty(StrEnum):
    """What counting promises of a route."""

    EXACT = "exact by count"
    PLAUSIBLE = "plausible"
    REFUSED = "refused"


@dataclass(frozen=True)
class Verdict:
    """Whether a route can recover an image, decided before it runs.

    Attributes:
        route: name in the registry.
        certainty: EXACT: the image follows by a linear solve. PLAUSIBLE: the route is a search or an estimate, so
            enough equations determine the image but do not promise that the route finds it. REFUSED: not run.
        unknowns: numbers to solve for, per independent system for the closed forms, per group otherwise.
        equations: numbers observed for them.
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
        """Kernel ridge from updates to images, fitted once for all that read it.

        Raises:
            R2FError: fewer than 20 proxies.
        """
        return AmortisedInverter(self.updates, self.images, self.labels, self.num_classes)


@dataclass(frozen=True)
class Problem:
    """All that a route may read. A field that is None was not observed or is not known.

    Attributes:
        base: the public base model.
        target: its adapted layers; None where exact gradients are observed and no adapter.
        shared: names of the parameters whose exact gradients are observed; None: of all.
        steps: the victims' steps T.
        batch: images of one group, b.
        gradients: exact gradients of V groups, parameter name -> gradient of the parameter's shape.
        adapters: the factors of V victims.
        observed: name -> their updates -B [V, d_out, r].
        a: name -> the common A of the victims and the proxies [r, d_in].
        initial: finds A before the first step (A_0).
        training: the victims' recipe.
        proxies: proxy updates with their images and labels.
        decoded: name -> the victims' decoded gradients [V, d_out, d_in].
        found: route -> reconstruction, of the routes that ran before.
        matching, refinement: configurations of the two gradient matching routes.
        gauss_newton, matrix_free: configurations of the searches.
        unet: configuration of the U-Net that refines the amortised estimate; None: kernel ridge alone.
        prior: (images, step) -> gradient [n, c, h, w] of a learned prior, added while matching.
    """

    base: BaseModel
    target: Target | None = None
    shared: Collection[str] | None = None
    steps: int | None = None
    batch: int = 1
    gradients: list[dict[str, Tensor]] | None = None
    adapters: list[LoraUpdate] | None = None
    observed: dict[str, Tensor] | None = None
    a: dict[str, Tensor] | None = None
    initial: InitialFactors | None = None
    training: Training | None = None
    proxies: Proxies | None = None
    decoded: Gradient | None = None
    found: Mapping[str, Reconstruction] = field(default_factory=dict)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    refinement: MatchingConfig = field(default_factory=MatchingConfig)
    gauss_newton: GaussNewtonConfig = field(default_factory=GaussNewtonConfig)
    matrix_free: MatrixFreeConfig = field(default_factory=MatrixFreeConfig)
    unet: UNetConfig | None = None
    prior: PriorGradient | None = None

    @property
    def victims(self) -> int:
        """V: groups whose images are looked for."""
        return len(self.adapters or self.gradients or ())


def adapter_problem(target: Target, adapters: list[LoraUpdate], initial: InitialFactors | None = None) -> Problem:
    """What adapters of one start show by themselves; proxies and decoded gradients are added by `replace`.

    Args:
        initial: where to look for A_0; None: among the common seeds.

    Raises:
        R2FError: the adapters are of different starts.
    """
    return Problem(
        target.base,
        target,
        steps=1 if all(untouched_a(update) for update in adapters) else None,
        adapters=adapters,
        observed=stack_updates(adapters),
        a=common_a(adapters),
        initial=initial or InitialFactors(target, adapters[0]),
    )


class Route(ABC):
    """A way from a Problem to images. A subclass in a module of `r2f_ext.inversion.routes` is found by its registry.

    Attributes:
        name: unique; also the name in report.json.
        title: of its row in pictures; None: the name.
        reads: fields of Problem without which the route has nothing to work on.
        after: routes whose reconstructions it reads from `Problem.found`.
        by_default: whether the route is taken unless routes are named.
    """

    name: ClassVar[str]
    title: ClassVar[str | None] = None
    reads: ClassVar[tuple[str, ...]]
    after: ClassVar[tuple[str, ...]] = ()
    by_default: ClassVar[bool] = True

    @abstractmethod
    def verdict(self, problem: Problem) -> Verdict:
        """Count unknowns and equations. Only `base`, `target`, `shared`, `steps` and `batch` need be set."""

    @abstractmethod
    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        """Images of the V victims. Called only where `reads` and `after` are there and the verdict is no refusal.

        Args:
            advance: called with the number of units done, `units` in all.
        """

    def units(self, problem: Problem) -> int:
        """Units of work that `run` announces through `advance`."""
        return 1

    def lacking(self, problem: Problem) -> str | None:
        """The first field of `reads` that the problem does not have."""
        return next((name for name in self.reads if getattr(problem, name) is None), None)
