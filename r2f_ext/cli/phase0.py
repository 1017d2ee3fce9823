"""`r2f phase0` and `r2f identifiability`: inversion of exact gradients, and which routes are possible by count."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from r2f_ext.audit.figures import write_images
from r2f_ext.audit.phase0 import phase0
from r2f_ext.cli.device import chosen_device
from r2f_ext.cli.display import console, print_notes, print_phase0, print_verdicts, table
from r2f_ext.data import images_for
from r2f_ext.files import output_folder
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.inversion.timm_table import COLUMNS, TIMM_MODELS, ClosedForms, closed_forms
from r2f_ext.models import load_base, shape_of


def run_phase0(options: argparse.Namespace) -> dict[str, Any]:
    """Invert the exact gradient of every image in closed form; returns what --json writes."""
    base = load_base(options.base, chosen_device(options))
    print_notes(base.notes)
    folder = output_folder(options.out)
    images = images_for(base, options.images, count=options.count, seed=options.seed, role="private")
    ceiling, verdicts = phase0(base, images)
    print_verdicts([(v.route, v.identifiable, v.why) for v in verdicts.values()])
    write_images(
        folder / "phase0.png",
        [("original", images.batch(slice(None))), *((one.figures.route, one.images) for one in ceiling)],
    )
    figures = [one.figures for one in ceiling]
    if figures:
        print_phase0(f"{len(images)} exact gradients, inverted in closed form", figures)
    else:
        console.print("No closed form applies to this base: see the reasons above; the picture shows the originals.")
    console.print(f"pictures: {escape(str(folder / 'phase0.png'))}")
    return {
        "phase0": [asdict(one) for one in figures],
        "identifiable": {v.route: v.identifiable for v in verdicts.values()},
        "notes": list(base.notes),
    }


def run_identifiability(options: argparse.Namespace) -> dict[str, Any]:
    """Print the counts of the closed forms for timm models; for a single model also the verdict of every route."""
    bases = {name: shape_of(name, options.image_size) for name in options.model or TIMM_MODELS}
    counted = {name: closed_forms(base) for name, base in bases.items()}
    rows = [[name, *one.cells()] for name, one in counted.items()]
    table("Which closed forms can be exact (batch 1)", list(COLUMNS), rows)
    if len(bases) == 1:
        (base,) = bases.values()
        print_verdicts([(v.route, v.identifiable, v.why) for v in identifiability(base).values()])
    return {name: _to_json(one) for name, one in counted.items()}


def _to_json(counts: ClosedForms) -> dict[str, Any]:
    data = asdict(counts)
    for verdict in (counts.patch_position, counts.attention_rowspace):
        data[verdict.route]["identifiable"] = verdict.identifiable
    return data
