"""What float32 products by oneDNN instead of MKL change on this processor (r2f_ext/onednn.py).

    python benchmarks/onednn.py [--json FILE]

The embedded model, an adapter of all its linear layers (r = 8). `ours` uses oneDNN, the rival MKL, in turns: a pass of
100 pairs; the Jacobian of the update map along 256 directions, and the slopes of 8 misfits (Gauss-Newton); the Gram
matrix of 1,000 updates (regressions). On a processor for which MKL stays the choice, both are forced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import interleaved_medians, json_parser, machine, row, sentence, write_json
from targets import all_linear, initial_a

from r2f_ext import onednn
from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.data import load_images
from r2f_ext.inversion.update_map import UpdateMap, flat_units
from r2f_ext.linalg import gram
from r2f_ext.models import load_base

PAIRS, DIRECTIONS, POINTS, UPDATES, ROUNDS = 100, 256, 8, 1000, 9


def main() -> None:
    asked = json_parser(__doc__).parse_args()
    chosen = onednn.wins()
    rows = []
    for what, function in works().items():

        def by(library: bool, function: Callable[[bool], object] = function) -> Callable[[], None]:
            def run() -> None:
                onednn.wins = lambda: library  # type: ignore[assignment]
                function(library)

            return run

        medians = interleaved_medians({"ours": by(True), "MKL": by(False)}, ROUNDS)
        rows.append(row(what, [], torch.float32, medians))
        print(sentence(rows[-1]), flush=True)
    onednn.wins = lambda: chosen  # type: ignore[assignment]
    if asked.json:
        write_json(asked.json, {"machine": machine(), "chosen": chosen, "rows": rows})


def works() -> dict[str, Callable[[bool], object]]:
    """What is timed; the argument tells which library is used, because a traced graph keeps the one of its trace."""
    base = load_base()
    target = all_linear(base)
    a, proxy = initial_a(target), load_images("embedded", count=UPDATES)
    images, labels = proxy.batch(slice(None))[:, None], proxy.labels[:, None]
    shape = torch.Size(base.input_shape)
    maps = {library: UpdateMap(target, a, shape, 64) for library in (True, False)}
    points = images[:POINTS].flatten(1)
    basis = torch.linalg.qr(torch.randn(shape.numel(), DIRECTIONS)).Q
    observed = maps[False](points.flip(0), labels[:POINTS, 0])

    def pairs(_: bool) -> object:
        with Capture(target) as capture:
            return project(target, capture(images[:PAIRS], labels[:PAIRS]), a)

    with Capture(target) as capture:
        parts = zip(images.split(PAIRS), labels.split(PAIRS), strict=True)
        updates = torch.cat([flat_units(project(target, capture(*part), a)) for part in parts])
    return {
        f"a pass of {PAIRS} pairs": pairs,
        f"Jacobian along {DIRECTIONS} directions": lambda library: maps[library].jacobian(points[0], labels[0], basis),
        f"slopes of {POINTS} misfits": lambda library: maps[library].slopes(points, labels[:POINTS, 0], observed),
        f"Gram matrix of {UPDATES} updates": lambda _: gram(updates),
    }


if __name__ == "__main__":
    main()
