"""Runs studies. A setting and seed is measured once and recorded at once, so that the next run does not repeat it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2f_ext import __version__
from r2f_ext.audit.record import public_name
from r2f_ext.env import environment
from r2f_ext.errors import R2FError, expected
from r2f_ext.files import output_folder, write_text
from r2f_ext.json_file import read_json_file
from r2f_ext.progress import Stages
from r2f_ext.studies.figure import write_figure
from r2f_ext.studies.page import write_page
from r2f_ext.studies.result import StudyResult
from r2f_ext.studies.study import Setting, Study, World

SCHEMA = 1
RECORD, TABLE, FIGURE, PAGE = "record.json", "table.csv", "figure.png", "page.md"


def run_study(
    study: Study, world: World, out: str | Path, seeds: Sequence[int] | None = None, stages: Stages | None = None
) -> StudyResult:
    """Measure every setting for every seed and write record.json, table.csv, figure.png and page.md to `out`/NAME.

    A cell is one setting with one seed. Cells that are in the record are not measured again: an interrupted run
    continues, and a run with more seeds adds cells. A cell that fails with an `R2FError`, for lack of memory or on a
    singular matrix is left out, and the page says why.

    Args:
        seeds: None: 0 to `study.seeds` - 1, in a quick world only 0.

    Raises:
        R2FError: no seeds, the folder holds a run with other options or cannot be written to, or no cell could be
            measured.
    """
    stages = stages or Stages()
    seeds = tuple(range(1 if world.quick else study.seeds) if seeds is None else seeds)
    if not seeds:
        raise R2FError("a study needs at least one seed.")
    folder = output_folder(Path(out) / study.name)
    options = _options(world)
    known = _known_cells(folder / RECORD, study, options)
    asked = [(seed, setting) for seed in seeds for setting in study.settings(world)]
    cells: list[Mapping[str, Any]] = []
    failed: dict[str, str] = {}
    with stages.stage(study.name, len(asked)) as advance:
        for seed, setting in asked:
            cell = known.get(_key(setting, seed))
            if cell is None:
                try:
                    cell = _measure(study, world, setting, seed)
                except Exception as error:
                    failed[_words(setting, seed)] = expected(error)
                    advance(1, f"{_words(setting, seed)}: failed: {expected(error)}")
                    continue
                known[_key(setting, seed)] = cell
                _write_record(folder / RECORD, study, options, known.values())
            cells.append(cell)
            advance(1)
    if not cells:
        raise R2FError(f"the study '{study.name}' could not be run: {next(iter(failed.values()))}")
    command = command_of(study, world, seeds)
    result = StudyResult(study, world, seeds, tuple(cells), folder, command, failed, environment())
    write_text(folder / TABLE, result.table.to_csv())
    write_figure(folder / FIGURE, study.panels, result.table)
    write_page(folder / PAGE, result)
    return result


def command_of(study: Study, world: World, seeds: Sequence[int]) -> str:
    """The command line that repeats a run; folders by their last part only."""
    plain, words = World(), ["r2f", "study", study.name]
    if world.quick:
        words.append("--quick")
    if world.base != plain.base:
        words += ["--base", public_name(world.base)]
    if world.data != plain.data:
        words += ["--private", public_name(world.data[0].private), "--proxy", public_name(world.data[0].proxy)]
    if len(seeds) != (1 if world.quick else study.seeds):
        words += ["--seeds", str(len(seeds))]
    if seeds[0] != 0:
        words += ["--seed", str(seeds[0])]
    return " ".join([*words, "--out", "DIR"])


def _measure(study: Study, world: World, setting: Setting, seed: int) -> Mapping[str, Any]:
    began = time.perf_counter()
    measured = study.measure(world, setting, seed)
    rows = [{"metric": m.metric, "values": _short(m.values), "labels": dict(m.labels)} for m in measured]
    return {"setting": dict(setting), "seed": seed, "seconds": time.perf_counter() - began, "measured": rows}


def _short(values: Sequence[float]) -> list[float]:
    """The values rounded to seven significant digits, the precision of float32."""
    return [float(f"{float(value):.7g}") for value in values]


def _options(world: World) -> dict[str, Any]:
    """What two runs must have in common to share cells."""
    data = [
        {**asdict(each), "private": public_name(each.private), "proxy": public_name(each.proxy)} for each in world.data
    ]
    device = world.device.type
    return {
        "version": __version__,
        "base": public_name(world.base),
        "data": data,
        "quick": world.quick,
        "device": device,
    }


def _known_cells(path: Path, study: Study, options: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cells of a record of the same study and options, by `_key`; none where there is no record."""
    if not path.exists():
        return {}
    remedy = "delete it, or choose another --out"
    record = read_json_file(path, "no record of a study", remedy)
    try:
        same = (record["schema"], record["study"], record["options"]) == (SCHEMA, study.name, options)
        cells = {_key(cell["setting"], cell["seed"]): cell for cell in record["cells"]}
    except (KeyError, TypeError) as error:
        raise R2FError(f"'{path}' is no record of a study: {remedy}.") from error
    if not same:
        raise R2FError(f"'{path}' is the record of a run with other options: {remedy}.")
    return cells


def _write_record(path: Path, study: Study, options: Mapping[str, Any], cells: Iterable[Mapping[str, Any]]) -> None:
    """One line a cell, which keeps the file small and its changes readable."""
    head = {"schema": SCHEMA, "study": study.name, "options": options, "environment": environment()}
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    write_text(path, f'{json.dumps(head)[:-1]}, "cells": [\n{lines}\n]}}\n')


def _key(setting: Mapping[str, Any], seed: int) -> str:
    return json.dumps([dict(setting), seed])


def _words(setting: Setting, seed: int) -> str:
    return ", ".join([*(f"{name} {value}" for name, value in setting.items()), f"seed {seed}"])
