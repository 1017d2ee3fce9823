"""Pair generation against other methods for per-sample gradients of an adapter.

ours               batched capture and projection from one A: updates, and gradients as factors
sequential PEFT    the definition, one image at a time: one forward and backward of the PEFT model gives the full
                   gradients and those of A and B; one SGD step; record B1 A1 and G; reset
vmap(grad)         torch.func, per-sample gradients of the PEFT model's B factors, in the same batches as ours
opacus             per-sample gradients of the same B factors by Opacus' hooks (only where opacus is installed)
bare model         forward and backward to the pixels of the base alone, with no gradient of any weight; its products
                   are PyTorch's, where ours may be oneDNN's (r2f_ext/onednn.py)
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from measure import Functions
from peft import LoraConfig, get_peft_model
from targets import ALPHA, RANK, all_linear, bare_model, initial_a
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from r2f_ext.audit.victims import TARGET_MODULES
from r2f_ext.data import ProceduralStream, load_images
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import BaseModel

pytestmark = pytest.mark.benchmark(group="pairs")
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "tf32", "bfloat16")}
LR = 0.1


@dataclass(frozen=True)
class Counts:
    """How many images a row uses. A GPU takes more, in larger batches.

    Attributes:
        sequential: for methods that take one image at a time.
        batched: for methods that take batches; batch: those of one batch of a rival.
        streamed: in a stream; more than the chunks that it caches, so that every call makes all of them.
    """

    sequential: int
    batched: int
    batch: int
    streamed: int

    @staticmethod
    def of(device: str) -> Counts:
        return Counts(8, 4096, 4096, 131072) if device == "cuda" else Counts(40, 400, 100, 500)


def layer_name(parameter: str) -> str:
    return parameter.removeprefix("base_model.model.").partition(".lora_")[0]


def peft_model(base: BaseModel, a: dict[str, Tensor]) -> nn.Module:
    """PEFT's own model at its default start, with the given A."""
    model = get_peft_model(
        copy.deepcopy(base.model), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGET_MODULES))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(a[layer_name(name)])
    return model


class SequentialPeft:
    """One image after another: step, record, reset."""

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
        """The updates B1 A1 and the full gradients, layer by layer."""
        self.model.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(self.base.normalize(image[None])), label[None]).backward()
        gradients = {name: p.grad for name, p in self.full.items()}
        self.optimizer.step()
        update = {layer: (b @ a).detach() for layer, (a, b) in self.layers.items()}
        with torch.no_grad():
            for name, parameter in self.factors.items():
                parameter.copy_(self.start[name])
        return update, gradients


def vmap_grad(
    base: BaseModel, a: dict[str, Tensor], inputs: Tensor, labels: Tensor, batch: int
) -> Callable[[], dict[str, Tensor]]:
    """Per-sample gradients of B by torch.func, batch after batch; returns those of the last batch."""
    model = peft_model(base, a)
    fixed = {name: p.detach() for name, p in (*model.named_parameters(), *model.named_buffers())}
    factors = {name: fixed.pop(name) for name in list(fixed) if "lora_B" in name}

    def loss(factors: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (factors, fixed), (image[None],))
        return F.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> dict[str, Tensor]:
        for first in range(0, len(labels), batch):
            found = per_sample(factors, inputs[first : first + batch], labels[first : first + batch])
        return {layer_name(name): g for name, g in found.items()}

    return run


def opacus_hooks(
    base: BaseModel, a: dict[str, Tensor], inputs: Tensor, labels: Tensor, batch: int
) -> Callable[[], dict[str, Tensor]]:
    """The same by Opacus' grad samplers, which record for every module with a trainable parameter: here B's."""
    from opacus import GradSampleModule

    model = peft_model(base, a)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False).train()  # it records in training only

    def run() -> dict[str, Tensor]:
        for first in range(0, len(labels), batch):
            wrapped.zero_grad(set_to_none=True)
            logits = wrapped(inputs[first : first + batch])
            F.cross_entropy(logits, labels[first : first + batch], reduction="sum").backward()
            found = {layer_name(n): p.grad_sample for n, p in model.named_parameters() if p.requires_grad}
        return found

    return run


class Pairs:
    """The embedded model, images, and every way to make their pairs."""

    def __init__(self, device: str) -> None:
        self.base, self.counts = load_base(device=device), Counts.of(device)
        proxy = load_images("embedded" if device == "cpu" else "procedural", count=self.counts.batched)
        self.images, self.labels = proxy.batch(slice(None)).to(device), proxy.labels.to(device)
        self.inputs = self.base.normalize(self.images)
        self.target = all_linear(self.base)
        self.a = initial_a(self.target)
        self.pairs = {p: GeneratedPairs(self.target, self.a, proxy, precision=p) for p in PRECISIONS[device]}

    def ours(self, precision: str = "float32") -> Callable[[], None]:
        def run() -> None:
            for _ in self.pairs[precision].batches():
                pass

        return run

    def dense(self) -> None:
        """Ours, with every full gradient written out."""
        for batch in self.pairs["float32"].batches():
            for name in self.target.names:
                batch.gradients.dense(name)

    def sequential(self) -> Callable[[], None]:
        loop = SequentialPeft(self.base, self.a)

        def run() -> None:
            for i in range(self.counts.sequential):
                loop.pair(self.images[i], self.labels[i])

        return run

    def batched_rivals(self) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """The rivals that take batches; the result of their last batch must agree with ours."""
        makers = {"vmap(grad)": vmap_grad}
        if importlib.util.find_spec("opacus") is not None:
            makers["opacus"] = opacus_hooks
        *_, last = self.pairs["float32"].batches()
        rivals = {
            name: make(self.base, self.a, self.inputs, self.labels, self.counts.batch) for name, make in makers.items()
        }
        for name, rival in rivals.items():
            for layer, found in rival().items():
                expected = last.updates[layer]
                limit = 1e-3 * float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=limit, msg=f"{name}, {layer}")
        return rivals

    def flops(self) -> float:
        """Operations of the bare model's pass over one image."""
        with FlopCounterMode(display=False) as counter:
            bare_model(self.base, self.images[:1], self.labels[:1], 1)()
        return counter.get_total_flops()


@pytest.fixture(scope="module")
def pairs(device: str) -> Pairs:
    return Pairs(device)


ROWS: dict[str, tuple[torch.dtype, Callable[[Pairs], Functions]]] = {
    "pairs": (
        torch.float32,
        lambda p: {"ours": p.ours(), "sequential PEFT": p.sequential(), **p.batched_rivals()},
    ),
    "pairs, dense G": (torch.float32, lambda p: {"ours": p.dense, "sequential PEFT": p.sequential()}),
    "pairs, tf32": (
        torch.float32,
        lambda p: {"ours": p.ours("tf32"), "pairs in float32": p.ours()},
    ),
    "pairs, bfloat16": (
        torch.bfloat16,
        lambda p: {"ours": p.ours("bfloat16"), "pairs in float32": p.ours(), "sequential PEFT": p.sequential()},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def bench_pairs(versus: Callable[..., None], pairs: Pairs, name: str) -> None:
    dtype, functions = ROWS[name]
    if name == "pairs, tf32" and pairs.base.device.type != "cuda":
        pytest.skip("tf32 is a precision of GPUs")
    batched = pairs.counts.batched
    items = {"ours": batched, "sequential PEFT": pairs.counts.sequential}
    items |= dict.fromkeys(("vmap(grad)", "opacus", "pairs in float32"), batched)
    versus(
        name,
        [1, *pairs.base.input_shape],
        lambda: functions(pairs),
        dtype=dtype,
        flops=pairs.flops(),
        items=items,
        tolerance=None,
        captured=False,
    )


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def bench_stream(versus: Callable[..., None], pairs: Pairs, device: str, precision: str) -> None:
    """The stream makes its procedural images while it runs; the images of the bare model are in memory."""
    if precision not in PRECISIONS[device] or (device == "cpu" and precision != "float32"):
        pytest.skip("measured on GPUs")
    base, counts = pairs.base, pairs.counts
    proxy = ProceduralStream(counts.streamed, base.input_shape, base.num_classes, device=device)
    stream = GeneratedPairs(pairs.target, pairs.a, proxy, precision=precision)

    def make() -> Functions:
        images = torch.rand(counts.streamed, *base.input_shape, device=device)
        labels = torch.zeros(counts.streamed, dtype=torch.int64, device=device)
        return {
            "ours": lambda: [None for _ in stream.batches()],
            "bare model in float32": bare_model(base, images, labels, counts.batch),
        }

    name = "stream of pairs" if precision == "float32" else f"stream of pairs, {precision}"
    shape = [counts.streamed, *base.input_shape]
    versus(name, shape, make, items=counts.streamed, tolerance=None, captured=False)
