"""Training many victims for ten steps in one batch, against training the same ones with PEFT, one after another.

Both keep the factors and the full gradients of every step (ours as factors, PEFT's loop as dense matrices); each is
timed in float32 and with the model under bfloat16 autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bench_pairs import layer_name, peft_model
from measure import Functions
from targets import all_linear, initial_a
from torch import Tensor

from r2f_ext.data import load_images
from r2f_ext.models import load_base
from r2f_ext.pairs import SimulatedPairs, Training, simulate

pytestmark = pytest.mark.benchmark(group="victims")
VICTIMS, SEQUENTIAL, STEPS = 100, 4, 10
TRAINING = Training(steps=STEPS, lr=0.1)


class Victims:
    """The embedded model, one start, and images for all victims."""

    def __init__(self, device: str) -> None:
        self.device, self.base = device, load_base(device=device)
        self.target = all_linear(self.base)
        self.a = initial_a(self.target)
        self.proxy = load_images("embedded", count=VICTIMS)
        self.images, self.labels = self.proxy.batch(slice(None)).to(device), self.proxy.labels.to(device)

    def together(self, precision: str) -> Callable[[], None]:
        pairs = SimulatedPairs(self.target, self.a, self.proxy, TRAINING, precision=precision)

        def run() -> None:
            for _ in pairs.batches():
                pass

        return run

    def one_after_another(self, precision: str) -> Callable[[], dict[str, Tensor]]:
        """PEFT's model and torch.optim.SGD; returns the last victim's B."""
        model = peft_model(self.base, self.a)
        named = dict(model.named_parameters())
        factors = {name: p for name, p in named.items() if "lora_" in name}
        full = [p.requires_grad_() for name, p in named.items() if name.endswith("base_layer.weight")]
        start = {name: p.detach().clone() for name, p in factors.items()}

        def run() -> dict[str, Tensor]:
            for i in range(SEQUENTIAL):
                with torch.no_grad():
                    for name, parameter in factors.items():
                        parameter.copy_(start[name])
                optimizer = torch.optim.SGD(factors.values(), lr=TRAINING.lr)
                saved: list[Tensor | None] = []
                for _ in range(STEPS):
                    model.zero_grad(set_to_none=True)
                    with torch.autocast(self.device, torch.bfloat16, enabled=precision == "bfloat16"):
                        logits = model(self.base.normalize(self.images[i : i + 1]))
                    F.cross_entropy(logits.float(), self.labels[i : i + 1]).backward()
                    saved += [weight.grad for weight in full]
                    optimizer.step()
            return {layer_name(name): p.detach().clone() for name, p in factors.items() if "lora_B" in name}

        return run

    def check(self, loop: Callable[[], dict[str, Tensor]]) -> None:
        """Check that the last victim of the loop equals that of the simulation."""
        count = SEQUENTIAL
        last = simulate(self.target, self.a, self.images[:count, None], self.labels[:count, None], TRAINING).b
        for name, found in loop().items():
            expected = last[name][-1]
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()), msg=name)


@pytest.fixture(scope="module")
def victims(device: str) -> Victims:
    return Victims(device)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def bench_victims(versus: Callable[..., None], victims: Victims, device: str, precision: str) -> None:
    if precision == "bfloat16" and device == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("without bfloat16 products in the processor the row takes more than eight minutes")
    precisions = dict.fromkeys(("float32", precision))

    def make() -> Functions:
        loops = {f"PEFT, one after another, {p}": victims.one_after_another(p) for p in precisions}
        victims.check(loops["PEFT, one after another, float32"])
        return {"ours": victims.together(precision), **loops}

    items = {"ours": VICTIMS} | {f"PEFT, one after another, {p}": SEQUENTIAL for p in precisions}
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    shape = [1, *victims.base.input_shape]
    name = f"victims, T = {STEPS}"
    versus(name, shape, make, dtype=dtype, items=items, tolerance=None, captured=False)
