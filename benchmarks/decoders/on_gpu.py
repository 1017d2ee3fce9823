"""The time that decoders, gradient matching and the amortised start take on a GPU.

    python benchmarks/decoders/on_gpu.py --json benchmarks/results/0.1.0/nvidia-h200-decoder-rates.json

The embedded model, an adapter of all its linear layers, 20,000 pairs from Fashion-MNIST. Matching: 24 victims at once
for 320 steps, with and without the capture of its iterations. Ridge: fit, and the decoding of 1,000 updates. MLP: 20
epochs. Amortised: 100 victims from 60,000 images, label by label. Every figure is of one run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, machine, write_json
from targets import all_linear, initial_a

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.data import load_images
from r2f_ext.decoders import MLP, Ridge
from r2f_ext.inversion import matching
from r2f_ext.inversion.label_by_label import invert_by_label
from r2f_ext.inversion.objectives import UpdateObjective
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import Target

PAIRS, DECODED, MATCHED, START = 20_000, 1_000, 24, 100
FEW, MANY = 20, 320  # steps of two runs of matching, the difference of whose times excludes the set-up


def main() -> None:
    options = json_parser(__doc__, required=True).parse_args()
    base = load_base(device="cuda")
    target = all_linear(base)
    a = initial_a(target)
    record: dict[str, Any] = {"machine": machine("cuda"), "rows": []}
    for what, value, unit in (*of_matching(target, a), *of_decoders(target, a), *of_the_start(target, a)):
        record["rows"].append({"what": what, "value": value, "unit": unit})
        print(f"{what}: {value:.4g} {unit}", flush=True)
        write_json(options.json, record)


Figures = Iterator[tuple[str, float, str]]


def seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def observed(target: Target, a: dict[str, Tensor], count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Updates of `count` private images, and their labels."""
    private = load_images("embedded", role="private")
    images, labels = private.batch(slice(0, count), "cuda"), private.labels[:count].cuda()
    with Capture(target) as capture:
        return project(target, capture(images[:, None], labels[:, None]), a), labels


def of_matching(target: Target, a: dict[str, Tensor]) -> Figures:
    updates, labels = observed(target, a, MATCHED)
    objective = UpdateObjective(target, a, updates)
    start, replayed = torch.full((MATCHED, 3, 32, 32), 0.5, device="cuda"), matching.Replayed
    for second_order in ("double_backward", "central_differences"):

        def search(steps: int, second_order: str = second_order) -> None:
            config = matching.MatchingConfig(steps=steps, second_order=second_order)
            matching.match(target, objective, start, labels, config, "matching", "")

        for how in ("eager", "captured"):
            capture: Any = replayed if how == "captured" else lambda function: function
            matching.Replayed = capture  # type: ignore[misc]
            search(FEW)
            short, long = seconds(lambda: search(FEW)), seconds(lambda: search(MANY))
            yield f"matching, {second_order}, {how}", (MANY - FEW) / (long - short), "iterations/s"


def of_decoders(target: Target, a: dict[str, Tensor]) -> Figures:
    pairs = GeneratedPairs(target, a, load_images("fashion-mnist"))
    ridge, mlp = Ridge(), MLP()
    yield "ridge, fit", seconds(lambda: ridge.fit(pairs, PAIRS)), "s"
    (first,) = pairs.batches(0, 1)
    asked = {name: torch.randn(DECODED, *each.shape[1:], device="cuda") for name, each in first.updates.items()}
    yield f"ridge, decode of {DECODED} updates", seconds(lambda: ridge.decode(asked)), "s"
    yield "MLP, fit", seconds(lambda: mlp.fit(pairs, PAIRS)), "s"


def of_the_start(target: Target, a: dict[str, Tensor]) -> Figures:
    updates, _ = observed(target, a, START)
    proxy = load_images("fashion-mnist")
    yield f"amortised start of {START} victims", seconds(lambda: invert_by_label(target, a, proxy, updates)), "s"


if __name__ == "__main__":
    main()
