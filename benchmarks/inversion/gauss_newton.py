"""Gauss-Newton in LoRA space from one-step adapters alone: how many images come back exactly, and when it fails.

    python benchmarks/inversion/gauss_newton.py --json benchmarks/results/0.1.0/gauss_newton.json

Real PEFT adapters (r = 8, all linear layers, one SGD step, float32 files), one for each of the first --victims
Fashion-MNIST test images; start: the amortised route on the proxy of --proxy. The originals are used for the scores
only. Victims are divided among --workers processes of one thread each: `seconds` are those of one thread. Rows are
written as they come, and those that are in the file already are not computed again. Other kinds of victims:
gauss_newton_variants.py.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.decoders import stack_updates
from r2f_ext.inversion.amortised import invert_by_label
from r2f_ext.inversion.exactness import REPRODUCED, exactness_of
from r2f_ext.inversion.gauss_newton import gauss_newton
from r2f_ext.inversion.side_by_side import GaussNewtonConfig
from r2f_ext.inversion.update_map import SUBSPACE_IMAGES, Subspace
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.types import BaseModel, Reconstruction, Target


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
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    base, path = load_base(), Path(options.json)
    record = json.loads(path.read_text()) if path.exists() else {"rows": [], "summary": {}}
    done = {row["victim"] for row in record["rows"]}
    if len(done) < options.victims:
        with tempfile.TemporaryDirectory() as folder:
            file = options.problem or Path(folder) / "problem.pt"
            if not file.exists():
                torch.save(of_peft(base, options.proxy, options.victims), file)
            for row in run(file, [v for v in range(options.victims) if v not in done], options.workers):
                record["rows"].append({"case": "peft", **row})
                record["summary"]["peft"] = summary(record["rows"])
                write_json(path, record)
    record["summary"]["peft"] = summary(record["rows"])
    write_json(path, record)
    print(record["summary"]["peft"], flush=True)


def of_peft(base: BaseModel, proxy: str, victims: int) -> Problem:
    private = load_images("embedded", role="private", count=victims)
    with tempfile.TemporaryDirectory() as folder:
        paths = train_victims(base, private.batch(slice(None)), private.labels, Path(folder) / "v", VictimConfig())
        bound = [attach(read_adapter(path), base) for path in paths]
    adapters = [adapter for _, adapter in bound]
    a = {name: each.float() for name, each in adapters[0].a.items()}
    return attack(bound[0][0], a, stack_updates(adapters), proxy, private)


def attack(target: Target, a: dict[str, Tensor], observed: dict[str, Tensor], proxy: str, private: ImageSet) -> Problem:
    """Start and subspace from public images."""
    count = 6000 if proxy == "procedural" else None  # each of them serves every label
    public = drop_private(load_images(proxy, count=count), private)
    began = time.perf_counter()
    start = invert_by_label(target, a, public, observed).reconstruction
    print(f"start: {psnr_db(start.images, private.batch(slice(None))).mean():.2f} dB, "
          f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    some = public.take(torch.arange(min(SUBSPACE_IMAGES, len(public))))
    return Problem(target, a, observed, start, Subspace.of(some.batch(slice(None))), private.batch(slice(None)))


PROBLEM: Problem | None = None  # of a worker


def run(file: Path, victims: list[int], workers: int) -> Any:
    """Rows of victims, as they come, of the problem in `file`."""
    # One thread each, also in what the workers import: set before they start.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(file,)) as pool:
        for future in as_completed([pool.submit(one, victim) for victim in victims]):
            row = future.result()
            print(row, flush=True)
            yield row


def _start_worker(file: Path) -> None:
    global PROBLEM
    torch.set_num_threads(1)
    PROBLEM = torch.load(file, weights_only=False)  # written by this script


def one(victim: int) -> dict[str, Any]:
    assert PROBLEM is not None and PROBLEM.start.labels is not None
    rows = slice(victim, victim + 1)
    start = replace(PROBLEM.start, images=PROBLEM.start.images[rows], labels=PROBLEM.start.labels[rows])
    observed = {name: update[rows] for name, update in PROBLEM.observed.items()}
    found = gauss_newton(PROBLEM.target, PROBLEM.a, observed, start, PROBLEM.subspace, GaussNewtonConfig())
    original = PROBLEM.originals[rows]
    return {
        "victim": victim,
        "start_psnr_db": float(psnr_db(start.images, original)),
        "psnr_db": float(psnr_db(found.images, original)),
        "residual": float(found.per_victim["residual"][0]),
        "start_residual": float(found.per_victim["start_residual"][0]),
        "bound_db": exactness_of(found, 0).bound_db,
        "free_directions": exactness_of(found, 0).free_directions,
        "passes": int(found.per_victim["passes"][0]),
        "seconds": found.seconds,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares over victims; precision and recall of a residual below REPRODUCED against 40 dB."""
    psnr = torch.tensor([row["psnr_db"] for row in rows])
    start = torch.tensor([row["start_psnr_db"] for row in rows])
    said = torch.tensor([row["residual"] < REPRODUCED for row in rows])
    exact = psnr >= 40
    both = float((said & exact).sum())
    return {
        "victims": len(rows),
        "start_psnr_db": float(start.mean()),
        "psnr_db": float(psnr.mean()),
        "psnr_db_median": float(psnr.median()),
        "at_least_40_db": float(exact.float().mean()),
        "at_least_60_db": float((psnr >= 60).float().mean()),
        "worse_than_start": int((psnr < start - 1e-3).sum()),
        "precision": both / float(said.sum()) if said.any() else None,
        "recall": both / float(exact.sum()) if exact.any() else None,
        "seconds_mean": sum(row["seconds"] for row in rows) / len(rows),
        "seconds_max": max(row["seconds"] for row in rows),
    }


if __name__ == "__main__":
    main()
