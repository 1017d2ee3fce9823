"""What a study found: its cells, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r2f_ext.studies.study import Study, World
from r2f_ext.studies.table import Table


@dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
        study: what was asked.
        world: what it ran on.
        seeds: of the victims, proxies and starts.
        cells: one for each setting and seed that was measured: `setting`, `seed`, `seconds`, and `measured`, a list of
            metric, values and labels.
        failed: (setting, seed) -> why it could not be measured, one sentence.
        folder: where its files are.
        command: the command line that repeats it.
        environment: versions, backends and threads, see `r2f_ext.env.environment`.
    """

    study: Study
    world: World
    seeds: tuple[int, ...]
    cells: tuple[Mapping[str, Any], ...]
    folder: Path
    command: str
    failed: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        return Table.of(self.cells)

    @property
    def seconds(self) -> float:
        """Wall time of all cells."""
        return float(sum(cell["seconds"] for cell in self.cells))

    def sentences(self) -> list[str]:
        """What the study concludes, with what qualifies it first."""
        said = [f"Not measured: {name}: {why}" for name, why in self.failed.items()]
        if self.world.quick:
            said.insert(
                0, "A quick run, of one seed and few settings: it shows that the study works, not what is true."
            )
        return [*said, *self.study.conclude(self.world, self.table)]
