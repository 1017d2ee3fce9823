"""End-to-end works with two installed versions of r2f_ext, in turns: is the newer one slower anywhere?

    git archive OLD | tar -x -C old-tree && pip install --no-build-isolation --no-deps --target old ./old-tree
    pip install --no-build-isolation --no-deps --target new .
    python benchmarks/pairs/compare_versions.py old new --json FILE

Each round starts one process for each version, in a random order, on all threads; a process measures every work once,
after a call to warm up. The works are those of `bench_end_to_end.py`, written with calls that both versions have
(versions since commit bef684a): a pass over 400 pairs, ten iterations of matching (1 and 8 victims), a ridge fit to
1,000 pairs, and one epoch of the MLP decoder on them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = 4
PAIRS, FITTED, STEPS = 400, 1000, 10


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from measure import json_parser, write_json

    parser = json_parser(__doc__)
    parser.add_argument("old", type=Path, help="folder that holds the package r2f_ext of the older version")
    parser.add_argument("new", type=Path, help="the same of the newer version")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    chance, milliseconds = random.Random(0), dict[str, dict[str, list[float]]]()
    for number in range(options.rounds):
        versions = {"old": options.old, "new": options.new}
        for version in chance.sample(list(versions), 2):
            for work, time_of in measured(versions[version].resolve()).items():
                milliseconds.setdefault(work, {"old": [], "new": []})[version].append(time_of)
        print(f"round {number + 1} of {options.rounds}", flush=True)
        rows = [row_of(work, **each) for work, each in milliseconds.items()]
        if options.json:
            write_json(Path(options.json), {"rows": rows})
    for row in rows:
        print(f"{row['work']:36} {row['old_ms']:9.1f} -> {row['new_ms']:9.1f} ms, {row['new_over_old']:.3f}")


def row_of(work: str, old: list[float], new: list[float]) -> dict[str, Any]:
    """Medians over the rounds, and the median of the rounds' ratios."""
    ratio = median(after / before for before, after in zip(old, new, strict=True))
    rounds = {"old": old, "new": new}
    return {"work": work, "old_ms": median(old), "new_ms": median(new), "new_over_old": ratio, "rounds": rounds}


def measured(package: Path) -> dict[str, float]:
    """Work -> milliseconds, of one process with the package in that folder."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, __file__, "--work"]
    told = subprocess.run(command, env=environment, cwd=package, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(told.splitlines()[-1])
    return figures


def work() -> None:
    """Print work -> milliseconds with the version that PYTHONPATH holds."""
    import torch

    from r2f_ext.capture import Capture
    from r2f_ext.data import load_images
    from r2f_ext.decoders import MLP, Ridge
    from r2f_ext.inversion.matching import MatchingConfig, match
    from r2f_ext.inversion.objectives import GradientObjective
    from r2f_ext.models import load_base
    from r2f_ext.ops import build_information
    from r2f_ext.pairs import GeneratedPairs
    from r2f_ext.types import AdaptedLayer, Gradient, Target

    if not build_information()["loaded"]:
        raise SystemExit("the compiled operators of a version are not used: install it for this torch, see `r2f env`.")
    base = load_base()
    ends = ("qkv", "attn.proj", "fc1", "fc2")
    linear = {n: m.weight for n, m in base.model.named_modules() if n.endswith(ends)}
    target = Target(base, tuple(AdaptedLayer(n, len(w), w.shape[1], 8, 2.0) for n, w in linear.items()))
    torch.manual_seed(0)
    a = {name: torch.randn(8, weight.shape[1]) / weight.shape[1] ** 0.5 for name, weight in linear.items()}
    proxy = load_images("embedded", count=FITTED)
    pairs, images = GeneratedPairs(target, a, proxy), proxy.batch(slice(0, 8))
    with Capture(target) as capture:
        gradient = capture(images[:, None], proxy.labels[:8, None])
    observed = {name: gradient.dense(name).detach() for name in target.names}
    config = MatchingConfig(steps=STEPS, second_order="double_backward")

    def matching(victims: int) -> Callable[[], object]:
        seen = {name: each[:victims] for name, each in observed.items()}
        start, labels = torch.full_like(images[:victims], 0.5), proxy.labels[:victims]
        return lambda: match(target, GradientObjective(Gradient(seen)), start, labels, config, "matching", "")

    works = {
        "pass over 400 pairs": lambda: [None for _ in pairs.batches(0, PAIRS)],
        "matching, 10 iterations, 1 victim": matching(1),
        "matching, 10 iterations, 8 victims": matching(8),
        "ridge fit to 1,000 pairs": lambda: Ridge().fit(pairs, FITTED),
        "MLP decoder, one epoch": lambda: MLP(epochs=1).fit(pairs, FITTED),
    }
    print(json.dumps({name: timed(function) for name, function in works.items()}))


def timed(function: Callable[[], object]) -> float:
    """Milliseconds of a call, after one to warm up."""
    function()
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main()
