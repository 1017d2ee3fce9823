"""Gauss-Newton in LoRA space from one-step adapters alone: how many images come back exactly, and when it fails.

    python benchmarks/inversion/gauss_newton.py --json FILE

Real PEFT adapters (r = 8, all linear layers, one SGD step, float32 files), one for each of the first --victims
Fashion-MNIST test images; start: `amortised_nearby` on --proxy. The originals are used for the scores only. On a CPU
victims are divided among --workers processes of one thread each, up to CHUNK at a time: `seconds` are those of one
thread. Rows are written as a process ends its victims, and those that are in the file already are not computed again.
Other kinds of victims: gauss_newton_variants.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import mean_interval, psnr_db
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.decoders import stack_updates
from r2f_ext.files import write_atomically
from r2f_ext.inversion import gauss_newton as module
from r2f_ext.inversion.exactness import REPRODUCED, Bound, exactness_of
from r2f_ext.inversion.gauss_newton import UpdateBound, gauss_newton
from r2f_ext.inversion.label_by_label import invert_by_label, invert_nearby
from r2f_ext.inversion.near_images import generated_nearby
from r2f_ext.inversion.start import start_among
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.update_map import SUBSPACE_IMAGES, Subspace
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.types import BaseModel, Reconstruction, Target

CASE = "peft, nearby"  # of the rows; those of earlier records, "peft", start from the first estimate


@dataclass(frozen=True)
class Problem:
    """What the attacker has, and the originals to score with."""

    target: Target
    a: dict[str, Tensor]
    observed: dict[str, Tensor]
    start: Reconstruction
    subspace: Subspace
    originals: Tensor


def main() -> None:
    parser = json_parser(__doc__, required=True)
    parser.add_argument("--victims", type=int, default=100)
    parser.add_argument("--problem", type=Path, help="file to keep the victims and their starts in between runs")
    parser.add_argument("--proxy", default="fashion-mnist")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--private", default="fashion-mnist")
    parser.add_argument("--only", type=int, nargs="+", help="the victims to search for, from 0 on (default: all)")
    parser.add_argument("--minutes", type=float, help="limit of a search, see Search.seconds")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    base, path = load_base(device=options.device), Path(options.json)
    config = GaussNewtonConfig(minutes=options.minutes)
    record = json.loads(path.read_text()) if path.exists() else {"rows": [], "summary": {}}
    if any(row["case"] != CASE for row in record["rows"]):
        parser.error(f"{path} holds searches from other starts: name another file.")
    done = {row["victim"] - options.first for row in record["rows"]}
    missing = [v for v in options.only or range(options.victims) if v not in done]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            file = options.problem or Path(folder) / "problem.pt"
            if not file.exists():
                private = some_private(options.private, options.first, options.victims)
                problem = of_peft(base, options.proxy, private)
                write_atomically(file, lambda temporary: torch.save(problem, temporary))
            rows = side_by_side(file, missing, config) if options.device == "cuda" else run(file, missing, options)
            for row in rows:
                record["rows"].append({"case": CASE, **row, "victim": row["victim"] + options.first})
                record["summary"][CASE] = summary(record["rows"])
                write_json(path, record)
    record["summary"][CASE] = summary(record["rows"])
    write_json(path, record)
    print(record["summary"][CASE], flush=True)


def some_private(name: str, first: int, count: int) -> ImageSet:
    """The images `first` to `first + count` of a private set."""
    return load_images(name, role="private", count=first + count).take(torch.arange(first, first + count))


def of_peft(base: BaseModel, proxy: str, private: ImageSet) -> Problem:
    with tempfile.TemporaryDirectory() as folder:
        paths = train_victims(
            base, private.batch(slice(None), base.device), private.labels, Path(folder) / "v", VictimConfig()
        )
        bound = [attach(read_adapter(path), base) for path in paths]
    adapters = [adapter for _, adapter in bound]
    a = {name: each.float() for name, each in adapters[0].a.items()}
    return attack(bound[0][0], a, stack_updates(adapters), proxy, private)


def attack(target: Target, a: dict[str, Tensor], observed: dict[str, Tensor], proxy: str, private: ImageSet) -> Problem:
    """Start and subspace from public images."""
    count = 6000 if proxy == "procedural" else None  # procedural images are used for every label
    public, device = drop_private(load_images(proxy, count=count), private), target.base.device
    began = time.perf_counter()
    first = invert_by_label(target, a, public, observed).reconstruction
    generated = generated_nearby(target.base, proxy)
    start = invert_nearby(target, a, public, observed, first, generated, private.images)
    some = public.take(torch.arange(min(SUBSPACE_IMAGES, len(public)))).batch(slice(None), device)
    begun, originals = start_among(some, start), private.batch(slice(None), device)
    print(
        f"start: {psnr_db(begun.estimate.images, originals).mean():.2f} dB, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return Problem(target, a, observed, begun.estimate, begun.subspace, originals)


PROBLEM: Problem | None = None  # of a worker


LIMITS = (30, 60, 120, 180, 240, 360, 480)  # seconds, of the curve in the summary
CHUNK = 12  # victims of one process before their rows are written


def run(file: Path, victims: list[int], options: Namespace) -> Any:
    """Yield the rows of victims of the problem in `file` as they are computed."""
    # One thread per worker. Set before the workers start, because libraries read this when they are imported.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    config = GaussNewtonConfig(minutes=options.minutes)
    count = max(options.workers, -(-len(victims) // CHUNK))
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), initializer=_start_worker, initargs=(file,)
    ) as pool:
        chunks = [victims[first::count] for first in range(count)]
        for future in as_completed([pool.submit(some, chunk, config) for chunk in chunks if chunk]):
            yield from future.result()


def side_by_side(file: Path, victims: list[int], config: GaussNewtonConfig) -> list[dict[str, Any]]:
    """Rows of all victims, searched together in this process."""
    return rows_of(torch.load(file, weights_only=False), victims, config)  # written by this script


def _start_worker(file: Path) -> None:
    global PROBLEM
    torch.set_num_threads(1)
    PROBLEM = torch.load(file, weights_only=False)  # written by this script


def some(victims: list[int], config: GaussNewtonConfig) -> list[dict[str, Any]]:
    assert PROBLEM is not None
    return rows_of(PROBLEM, victims, config)


class TimedBound(UpdateBound):
    """Adds up the seconds of all bounds of this process."""

    seconds = 0.0

    def __call__(self, victim: int, image: Tensor, label: Tensor) -> Bound:
        began = time.perf_counter()
        found = super().__call__(victim, image, label)
        TimedBound.seconds += time.perf_counter() - began
        return found


def rows_of(problem: Problem, victims: list[int], config: GaussNewtonConfig) -> list[dict[str, Any]]:
    assert problem.start.labels is not None
    rows = torch.tensor(victims, device=problem.originals.device)
    start = replace(problem.start, images=problem.start.images[rows], labels=problem.start.labels[rows])
    observed = {name: update[rows] for name, update in problem.observed.items()}
    module.UpdateBound, TimedBound.seconds = TimedBound, 0.0  # type: ignore[misc]
    told = lambda _, line="": print(line, flush=True)  # noqa: E731
    found = gauss_newton(problem.target, problem.a, observed, start, problem.subspace, config, told)
    original, figures = problem.originals[rows], found.per_victim
    before, after = psnr_db(start.images, original), psnr_db(found.images, original)
    exactness = [exactness_of(found, place) for place in range(len(victims))]
    return [
        {
            "victim": victim,
            "start_psnr_db": float(before[place]),
            "psnr_db": float(after[place]),
            "residual": float(figures["residual"][place]),
            "start_residual": float(figures["start_residual"][place]),
            "exact": exactness[place].exact,
            "bound_db": exactness[place].bound_db,
            "free_directions": exactness[place].free_directions,
            "passes": int(figures["passes"][place]),
            "stopped": bool(figures["stopped"][place]),
            "seconds": float(figures["search_seconds"][place]),
            "bound_seconds": TimedBound.seconds / len(victims),
        }
        for place, victim in enumerate(victims)
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares over victims; precision and recall of a residual below REPRODUCED against 40 dB."""
    psnr = torch.tensor([row["psnr_db"] for row in rows])
    start = torch.tensor([row["start_psnr_db"] for row in rows])
    said = torch.tensor([row["residual"] < REPRODUCED for row in rows])
    exact = psnr >= 40
    both = float((said & exact).sum())
    seconds = [row["seconds"] for row in rows]
    return {
        "victims": len(rows),
        "start_psnr_db": float(start.mean()),
        "psnr_db": float(psnr.mean()),
        "psnr_db_median": float(psnr.quantile(0.5)),
        "at_least_40_db": float(exact.float().mean()),
        "at_least_60_db": float((psnr >= 60).float().mean()),
        "worse_than_start": int((psnr < start - 1e-3).sum()),
        "precision": both / float(said.sum()) if said.any() else None,
        "recall": both / float(exact.sum()) if exact.any() else None,
        "called_exact": sum(row.get("exact", False) for row in rows),
        "falsely_exact": sum(row.get("exact", False) and row["psnr_db"] < 40 for row in rows),
        "seconds_mean": sum(seconds) / len(rows),
        "seconds_interval": mean_interval(seconds, seed=0),
        "seconds_median": median(seconds),
        "seconds_max": max(seconds),
        # Seconds of a search -> victims found within them: the curve "share found against time".
        "found_within": {
            limit: sum(row["seconds"] <= limit and row["psnr_db"] >= 40 for row in rows) for limit in LIMITS
        },
    }


if __name__ == "__main__":
    main()
