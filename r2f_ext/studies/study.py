"""The interface of a study: one open question, answered by measurements at several settings and seeds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch

from r2f_ext.studies.table import Table, Value

Size = TypeVar("Size")

Setting = Mapping[str, Value]
"""What distinguishes one measurement from the others of its study: column -> value. Plain JSON."""


@dataclass(frozen=True)
class Data:
    """Private images and the public ones that an attacker has, both as `load_images` names them."""

    name: str
    private: str
    proxy: str


CLOTHES = Data("clothes", "embedded", "embedded")
FACES = Data("faces", "lfw", "procedural")
PHOTOS = Data("photos", "photos", "photos")  # proxies are crops of other photographs than private images


@dataclass(frozen=True)
class World:
    """What a study is run on.

    Attributes:
        base: the base model, as `load_base` names it.
        data: private sets with their proxies; studies that need only one take the first.
        quick: a run of a minute or two that shows that the study works; its figures are too few to conclude from.
        device: of the base model.
    """

    base: str = "embedded"
    data: tuple[Data, ...] = (CLOTHES, FACES, PHOTOS)
    quick: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def named(self, name: str) -> Data:
        """The data of that name."""
        return next(each for each in self.data if each.name == name)

    def of(self, full: Size, quick: Size) -> Size:
        """The sizes of a full or of a quick run, whichever this is."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Measured:
    """One figure, measured on n victims at one setting.

    Attributes:
        metric: what was measured, with its unit (`psnr_db`, `cosine`, `seconds`).
        values: one per victim, or a single one if the figure does not belong to a victim.
        labels: further columns beside those of the setting (route, decoder, layer, ...).
    """

    metric: str
    values: Sequence[float]
    labels: Setting = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One drawing of a study's figure.

    Attributes:
        metric: on the vertical axis.
        x: the column on the horizontal axis: numbers are joined by lines, words become bars. Or a second metric: its
            mean at the same setting is then the x coordinate of each point.
        series: columns whose values name the lines or the colours of the bars.
        where: rows must have these values; a tuple allows several.
        title, x_label, y_label: "" takes the names of the columns.
        x_log, y_log: logarithmic axes.
        lines: value on the vertical axis -> what a dotted line there marks.
    """

    metric: str
    x: str
    series: tuple[str, ...] = ()
    where: Mapping[str, Value | tuple[Value, ...]] = field(default_factory=dict)
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    x_log: bool = False
    y_log: bool = False
    lines: Mapping[float, str] = field(default_factory=dict)


class Study(ABC):
    """One question. Subclasses in modules of `r2f_ext.studies.questions` are registered automatically.

    Attributes:
        name: unique; the argument of `r2f study`.
        question: one sentence, as a reader would ask it.
        method: a short paragraph: victims, proxies, what is measured, and what the controls are.
        no_controls: why a control of docs/protocol.md is missing; "": none is.
        panels: the figure.
        seeds: how many seeds a full run takes; a quick one takes one.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    method: ClassVar[str]
    no_controls: ClassVar[str] = ""
    panels: ClassVar[tuple[Panel, ...]]
    seeds: ClassVar[int] = 3

    @abstractmethod
    def settings(self, world: World) -> list[Setting]:
        """Every setting to measure, in the order of the tables; quick worlds have few."""

    @abstractmethod
    def measure(self, world: World, setting: Setting, seed: int) -> list[Measured]:
        """Measure one setting. Seed s uses victims, proxies and starts of its own, so that seeds are independent.

        All randomness is derived from the seed. Calls are made seed by seed, in the order of `settings`, but a resumed
        run can begin anywhere in that order. What settings share is therefore cached, not passed from call to call.
        """

    @abstractmethod
    def conclude(self, world: World, table: Table) -> list[str]:
        """Whole sentences on the results in the table, negative results first. They must be true of any table."""
