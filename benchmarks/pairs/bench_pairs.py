"""Pair generation against the seed's procedure done literally with PEFT, at equal settings, in one run.

    python benchmarks/pairs/bench_pairs.py [--json FILE]

Sequential loop: one batch-1 forward and backward of the PEFT model gives the full gradients (of the adapted base
weights) and those of A and B; one SGD step; record B1 A1 and G, as the brief stores them; reset A and B. Ours: batched
capture and projection from the same A, once with gradients as factors (what the pipeline uses) and once writing every
G out. `bare model`: forward and input-gradient backward of the base alone, the floor of any method.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_json

from r2f_ext.audit.victims import TARGET_MODULES, VictimConfig, train_victim
from r2f_ext.data import ImageSet, load_images
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import BaseModel

ROUNDS, SEQUENTIAL, BATCHED = 7, 40, 400
LR = 0.1


class SequentialPeft:
    """The brief's loop: step, record, reset."""

    def __init__(self, base: BaseModel) -> None:
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGET_MODULES))
        self.base, self.model = base, get_peft_model(copy.deepcopy(base.model), lora)
        named = dict(self.model.named_parameters())
        self.factors = {name: p for name, p in named.items() if "lora_" in name}
        self.full = {name: p for name, p in named.items() if name.endswith("base_layer.weight")}
        for parameter in self.full.values():
            parameter.requires_grad_(True)
        self.layers = {
            name.replace(".lora_A.default.weight", ""): (p, self.factors[name.replace("lora_A", "lora_B")])
            for name, p in self.factors.items()
            if ".lora_A." in name
        }
        self.start = {name: p.detach().clone() for name, p in self.factors.items()}
        self.optimizer = torch.optim.SGD(self.factors.values(), lr=LR)

    def pair(self, image: Tensor, label: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.model.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.base.normalize(image[None])), label[None]).backward()
        gradients = {name: p.grad for name, p in self.full.items()}
        self.optimizer.step()
        update = {layer: (b @ a).detach() for layer, (a, b) in self.layers.items()}
        with torch.no_grad():
            for name, parameter in self.factors.items():
                parameter.copy_(self.start[name])
        return update, gradients


def rates(functions: dict[str, tuple[int, Callable[[], None]]]) -> dict[str, float]:
    """name -> pairs a second, median of interleaved rounds after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for done in range(ROUNDS + 1):
        for name, (_, function) in functions.items():
            began = time.perf_counter()
            function()
            if done:
                seconds[name].append(time.perf_counter() - began)
    return {name: functions[name][0] / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(2)
    base = load_base()
    proxy = load_images("embedded", count=BATCHED)
    images, labels = proxy.batch(slice(None)), proxy.labels
    with tempfile.TemporaryDirectory() as folder:
        victim = train_victim(base, images[0], int(labels[0]), Path(folder), VictimConfig(lr=LR))
        target, adapter = attach(read_adapter(victim), base)
    pairs = GeneratedPairs(target, adapter.a, ImageSet("proxy", proxy.images, labels))
    loop = SequentialPeft(base)

    def sequential() -> None:
        for i in range(SEQUENTIAL):
            loop.pair(images[i], labels[i])

    def factors() -> None:
        for _ in pairs.batches():
            pass

    def dense() -> None:
        for batch in pairs.batches():
            for name in target.names:
                batch.gradients.dense(name)

    def bare() -> None:
        for first in range(0, BATCHED, 100):
            inputs = base.normalize(images[first : first + 100]).requires_grad_()
            loss = F.cross_entropy(base.model(inputs), labels[first : first + 100], reduction="sum")
            torch.autograd.grad(loss, inputs)

    measured = rates(
        {
            "sequential PEFT loop": (SEQUENTIAL, sequential),
            "ours, factors": (BATCHED, factors),
            "ours, dense G": (BATCHED, dense),
            "bare model": (BATCHED, bare),
        }
    )
    rows = []
    for name, rate in measured.items():
        ratio = rate / measured["sequential PEFT loop"]
        print(f"{name:24} {rate:8.1f} pairs/s   {ratio:6.2f}x the sequential loop")
        rows.append({"name": name, "pairs_per_second": rate, "ratio_to_sequential": ratio, "rounds": ROUNDS})
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
