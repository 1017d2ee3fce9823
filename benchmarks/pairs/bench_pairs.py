"""Pair generation against everything else that does the same work, in one run.

    python benchmarks/pairs/bench_pairs.py [--device cuda] [--json FILE]

ours               batched capture and projection from one A: updates, and gradients as factors
ours, dense G      the same, every full gradient written out
ours, bfloat16     the same as `ours`, the model under bfloat16 autocast
bare model         forward and backward to the pixels of the base alone: no gradient of any weight
sequential PEFT    the brief's loop, literally: one batch-1 forward and backward of the PEFT model gives the full
                   gradients and those of A and B; one SGD step; record B1 A1 and G; reset
vmap(grad)         torch.func, per-sample gradients of the PEFT model's B factors, in the same batches as ours
opacus             per-sample gradients of the same B factors by Opacus' hooks (only where opacus is installed)
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, options, row, say, write_json

from r2f_ext.audit.victims import TARGET_MODULES, VictimConfig, train_victim
from r2f_ext.data import load_images
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import BaseModel

ROUNDS, SEQUENTIAL, BATCHED, BATCH = 7, 40, 400, 100
LR = 0.1


def peft_model(base: BaseModel, a: dict[str, Tensor]) -> nn.Module:
    """PEFT's own model at its default start, with the given A."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGET_MODULES))
    model = get_peft_model(copy.deepcopy(base.model), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(a[layer_name(name)])
    return model


def layer_name(parameter: str) -> str:
    return parameter.removeprefix("base_model.model.").partition(".lora_")[0]


class SequentialPeft:
    """The brief's loop: step, record, reset."""

    def __init__(self, base: BaseModel, a: dict[str, Tensor]) -> None:
        self.base, self.model = base, peft_model(base, a)
        named = dict(self.model.named_parameters())
        self.factors = {name: p for name, p in named.items() if "lora_" in name}
        self.full = {name: p for name, p in named.items() if name.endswith("base_layer.weight")}
        for parameter in self.full.values():
            parameter.requires_grad_(True)
        self.layers = {
            layer_name(name): (p, self.factors[name.replace("lora_A", "lora_B")])
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


def vmap_grad(base: BaseModel, a: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Per-sample gradients of B for one batch after another, by torch.func."""
    model = peft_model(base, a)
    fixed = {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers())}
    factors = {name: fixed.pop(name) for name in list(fixed) if "lora_B" in name}

    def loss(factors: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (factors, fixed), (image[None],))
        return F.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> dict[str, Tensor]:
        for first in range(0, len(labels), BATCH):
            found = per_sample(factors, inputs[first : first + BATCH], labels[first : first + BATCH])
        return {layer_name(name): g for name, g in found.items()}

    return run


def opacus_hooks(
    base: BaseModel, a: dict[str, Tensor], inputs: Tensor, labels: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """The same by Opacus' grad samplers, which record on every module with a trainable parameter: here those of B."""
    from opacus import GradSampleModule

    model = peft_model(base, a)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False).train()  # it records in training only

    def run() -> dict[str, Tensor]:
        for first in range(0, len(labels), BATCH):
            wrapped.zero_grad(set_to_none=True)
            logits = wrapped(inputs[first : first + BATCH])
            F.cross_entropy(logits, labels[first : first + BATCH], reduction="sum").backward()
            found = {layer_name(n): p.grad_sample for n, p in model.named_parameters() if p.requires_grad}
        return found

    return run


def main() -> None:
    asked = options(__doc__)
    warnings.filterwarnings("ignore")  # Opacus and PEFT comment on how they are used
    base = load_base(device=asked.device)
    proxy = load_images("embedded", count=BATCHED)
    images, labels = proxy.batch(slice(None)).to(asked.device), proxy.labels.to(asked.device)
    with tempfile.TemporaryDirectory() as folder:
        victim = train_victim(base, images[0], int(labels[0]), Path(folder), VictimConfig(lr=LR))
        target, adapter = attach(read_adapter(victim), base)
    full, low = (GeneratedPairs(target, adapter.a, proxy, precision=p) for p in ("float32", "bfloat16"))
    loop, inputs = SequentialPeft(base, adapter.a), base.normalize(images)

    def sequential() -> None:
        for i in range(SEQUENTIAL):
            loop.pair(images[i], labels[i])

    def dense() -> None:
        for batch in full.batches():
            for name in target.names:
                batch.gradients.dense(name)

    def bare() -> None:
        for first in range(0, BATCHED, BATCH):
            x = inputs[first : first + BATCH].clone().requires_grad_()
            loss = F.cross_entropy(base.model(x), labels[first : first + BATCH], reduction="sum")
            torch.autograd.grad(loss, x)

    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: [None for _ in full.batches()],
        "ours, dense G": dense,
        "ours, bfloat16": lambda: [None for _ in low.batches()],
        "bare model": bare,
        "sequential PEFT": sequential,
        "vmap(grad)": vmap_grad(base, adapter.a, inputs, labels),
    }
    if importlib.util.find_spec("opacus") is not None:
        functions["opacus"] = opacus_hooks(base, adapter.a, inputs, labels)
    *_, last = full.batches()
    for rival in ("vmap(grad)", "opacus"):  # they must do the same work
        for name, found in functions[rival]().items() if rival in functions else ():
            expected = last.updates[name]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    counts = {"sequential PEFT": SEQUENTIAL}
    measured = interleaved_medians(functions, ROUNDS, asked.device)
    per_pair = {name: time / counts.get(name, BATCHED) for name, time in measured.items()}

    for name, milliseconds in per_pair.items():
        print(f"{name:16} {1e3 / milliseconds:8.1f} pairs/s")
    sample = inputs[:1].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:  # what the model itself costs
        F.cross_entropy(base.model(sample), labels[:1]).backward()
    flops = counter.get_total_flops()

    def line(name: str, dtype: torch.dtype, ours: str, rival: str, label: str | None = None) -> dict[str, Any]:
        times = {"ours": per_pair[ours], label or rival: per_pair[rival]}
        return row(name, [1, *base.input_shape], dtype, times, asked.device, flops=flops)

    rivals = [name for name in functions if not name.startswith("ours")]
    rows = [line("pairs", torch.float32, "ours", rival) for rival in rivals]
    rows.append(line("pairs, dense G", torch.float32, "ours, dense G", "sequential PEFT"))
    rows.append(line("pairs", torch.bfloat16, "ours, bfloat16", "ours", "pairs in float32"))
    rows.append(line("pairs", torch.bfloat16, "ours, bfloat16", "sequential PEFT"))
    for each in rows:
        say(each)
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
