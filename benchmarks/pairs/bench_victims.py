"""Training many victims for ten steps, all at once, against training the same ones with PEFT, one after another.

    python benchmarks/pairs/bench_victims.py [--device cuda] [--json FILE]

Both keep the factors and the full gradients of every step (ours as factors, PEFT's loop as it makes them: dense); each
is timed in float32 and with the model under bfloat16 autocast.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleaved_medians, options, row, say, write_json

from r2f_ext.audit.victims import TARGET_MODULES
from r2f_ext.data import load_images
from r2f_ext.models import load_base
from r2f_ext.pairs import SimulatedPairs, Training, simulate
from r2f_ext.types import AdaptedLayer, BaseModel, Target

ROUNDS, VICTIMS, SEQUENTIAL, STEPS = 5, 100, 4, 10
LR, RANK, ALPHA = 0.1, 8, 16


def layer_of(parameter: str) -> str:
    return parameter.removeprefix("base_model.model.").partition(".lora_")[0]


def peft_victims(base: BaseModel) -> tuple[torch.nn.Module, Target, dict[str, Tensor]]:
    """PEFT's model at its start, and the same start for the simulation."""
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGET_MODULES))
    model = get_peft_model(load_base("embedded", base.device).model, lora)
    a = {layer_of(n): p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    shapes = {name: base.model.get_submodule(name).weight.shape for name in a}
    layers = tuple(AdaptedLayer(name, *shape, RANK, ALPHA / RANK) for name, shape in shapes.items())
    return model, Target(base, layers), a


def main() -> None:
    asked = options(__doc__)
    base = load_base(device=asked.device)
    proxy = load_images("embedded", count=VICTIMS)
    images, labels = proxy.batch(slice(None)).to(asked.device), proxy.labels.to(asked.device)
    model, target, a = peft_victims(base)
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    full = [model.base_model.model.get_submodule(n).base_layer.weight.requires_grad_() for n in target.names]
    start = [p.detach().clone() for p in factors]

    def one_after_another(low: bool = False) -> list[Tensor]:
        for i in range(SEQUENTIAL):
            with torch.no_grad():
                for parameter, at_start in zip(factors, start, strict=True):
                    parameter.copy_(at_start)
            optimizer = torch.optim.SGD(factors, lr=LR)
            kept = []
            for _ in range(STEPS):
                model.zero_grad(set_to_none=True)
                with torch.autocast(asked.device, torch.bfloat16, enabled=low):
                    logits = model(base.normalize(images[i : i + 1]))
                F.cross_entropy(logits.float(), labels[i : i + 1]).backward()
                kept += [weight.grad for weight in full]
                optimizer.step()
        return kept

    training = Training(steps=STEPS, lr=LR)
    exact, low = (SimulatedPairs(target, a, proxy, training, precision=p) for p in ("float32", "bfloat16"))

    def together(pairs: SimulatedPairs) -> None:
        for _ in pairs.batches():
            pass

    one_after_another()  # they must do the same work
    last = simulate(target, a, images[:SEQUENTIAL, None], labels[:SEQUENTIAL, None], training).b
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            expected = last[layer_of(name)][-1]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))

    measured = interleaved_medians(
        {
            "ours": lambda: together(exact),
            "ours, bfloat16": lambda: together(low),
            "PEFT, one after another": one_after_another,
            "PEFT, one after another, bfloat16": lambda: one_after_another(low=True),
        },
        ROUNDS,
        asked.device,
    )
    per_victim = {name: time / (VICTIMS if "ours" in name else SEQUENTIAL) for name, time in measured.items()}
    rivals = {name: time for name, time in per_victim.items() if "ours" not in name}
    float32 = {"ours": per_victim["ours"], "PEFT, one after another": rivals["PEFT, one after another"]}
    bfloat16 = {"ours": per_victim["ours, bfloat16"], **rivals}
    name, shape = f"victims, T = {STEPS}", [1, *base.input_shape]
    rows = [
        row(name, shape, torch.float32, float32, asked.device),
        row(name, shape, torch.bfloat16, bfloat16, asked.device),
    ]
    for line in rows:
        say(line)
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
