"""`r2f study`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.text import Text

from r2f_ext.audit.record import public_name
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import console, drawn_stages
from r2f_ext.cli.inputs import Options
from r2f_ext.errors import R2FError
from r2f_ext.files import output_folder
from r2f_ext.studies import Data, StudyResult, World, run_study
from r2f_ext.studies.page import write_html
from r2f_ext.studies.questions import chosen

HTML = "studies.html"  # of all studies


def run_study_command(options: Options) -> dict[str, Any]:
    """Run one study or all; returns what --json writes: study -> sentences, files and failures."""
    studies, world, folder = chosen(options.study), world_of(options), output_folder(options.out)
    results: list[StudyResult] = []
    failures: list[str] = []
    for study in studies:
        first, count = options.seed, options.seeds or (1 if world.quick else study.seeds)
        try:
            with drawn_stages() as stages:
                results.append(run_study(study, world, folder, range(first, first + count), stages))
        except R2FError as error:
            if len(studies) == 1:
                raise
            failures.append(str(error))
            continue
        _print(results[-1])
        failures += [f"{study.name}: {name} could not be measured." for name in results[-1].failed]
    if len(studies) > 1 and results:
        write_html(folder / HTML, results)
        console.print(f"all studies in one page: {escape(str(folder / HTML))}")
    printed: dict[str, Any] = {result.study.name: _to_json(result) for result in results}
    return printed | ({"incomplete": " ".join(failures)} if failures else {})


def world_of(options: Options) -> World:
    """What the studies run on: the protocol's sets, or one of the user's own.

    Raises:
        R2FError: there is no such device.
    """
    world = World(base=options.base, quick=options.quick, device=torch.device(chosen_device(options)))
    if options.private is None:
        return world
    return World(
        world.base, (Data(public_name(options.private), options.private, options.proxy),), world.quick, world.device
    )


def _print(result: StudyResult) -> None:
    console.print(Text(result.study.question, style="bold"))
    for sentence in result.sentences():
        console.print(Text(sentence))
    console.print(Text("12.3 (11.7 to 13.1; n = 24) is a mean with its 95 % bootstrap interval over n values."))
    console.print(f"page, figure, table and record: {escape(str(Path(result.folder)))}\n")


def _to_json(result: StudyResult) -> dict[str, Any]:
    return {
        "question": result.study.question,
        "sentences": result.sentences(),
        "failed": dict(result.failed),
        "seconds": result.seconds,
        "folder": str(result.folder),
    }
