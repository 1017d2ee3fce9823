"""Gradient inversion against breaching 0.1.2: one run, the same models, images and exact gradients.

    python benchmarks/inversion/compare_breaching.py [--steps 400] [--images 2] [--threads 2] [--json FILE]

Needs `pip install breaching==0.1.2` (or the extra `bench`). Two models, batch 1, labels given to both sides:

* breaching's own ConvNet (width 32, random weights, eval mode) on 32x32 images: its `invertinggradients` with --steps
  steps against `match` with a quarter as many, from the same random start and for the same objective. Of breaching's
  configuration only the number of steps is changed; its step-size schedule follows from that number.
* the embedded ViT: breaching's `invertinggradients` and `april_analytic` against `match` (as many steps) and the
  closed forms.

breaching inverts one image after another, `match` all at once. PSNR is the mean over the images, seconds are those of
all images together. The PSNR over time is recorded for both: for breaching by a regularizer that adds nothing to its
loss, for `match` by `watch`. The table says when each first reached the best PSNR that breaching reached.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import load_images
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.matching import MatchingConfig, match
from r2f_ext.inversion.objectives import GradientObjective
from r2f_ext.inversion.route import Problem
from r2f_ext.inversion.routes import run_routes, verdicts_of
from r2f_ext.models import load_base
from r2f_ext.types import BaseModel, Gradient, Reconstruction

warnings.filterwarnings("ignore")
CIFAR_MEAN, CIFAR_STD = (0.4915, 0.4823, 0.4468), (0.2470, 0.2435, 0.2616)
# The objective is breaching's: its weight of total variation, 0.2 in normalised units, is 0.8 (ConvNet) and 0.57 (ViT)
# for pixels in [0, 1], and its step size of 0.1 is 0.025 and 0.035. Only the steps differ: they follow a cosine
# schedule, and for the ConvNet they begin six times as long and are a quarter as many.
CONV = MatchingConfig(loss="cosine", tv_weight=0.8, step_size=0.15, schedule="cosine")
VIT = MatchingConfig(loss="cosine", tv_weight=0.57, step_size=0.035, schedule="cosine")
FEWER = 4

Trace = list[tuple[float, float]]  # seconds since the start, mean PSNR


def conv_base(seed: int, width: int = 32) -> BaseModel:
    from breaching.cases.models.model_preparation import ConvNet

    torch.manual_seed(seed)
    model = ConvNet(width=width, num_classes=10, num_channels=3).eval().requires_grad_(False)
    return BaseModel(model, "breaching ConvNet", (3, 32, 32), CIFAR_MEAN, CIFAR_STD, 10)


def images_of(base: BaseModel, count: int) -> tuple[Tensor, Tensor]:
    """Half faces, half Fashion-MNIST test images, gray on three channels; faces have random labels."""
    faces = load_images("lfw", input_shape=base.input_shape, num_classes=10, count=count - count // 2, role="private")
    clothes = load_images(
        "embedded", input_shape=base.input_shape, num_classes=10, count=count // 2 or 1, role="private"
    )
    images = torch.cat([faces.batch(slice(None)), clothes.batch(slice(None))])[:count]
    return images, torch.cat([faces.labels, clothes.labels])[:count]


class Wrapped(nn.Module):
    """breaching looks for the model under `.model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Recorder(nn.Module):
    """A regularizer of value 0 that records the PSNR of breaching's candidate."""

    def __init__(self, base: BaseModel, truth: Tensor, every: int) -> None:
        super().__init__()
        self.base, self.truth, self.every = base, truth, every
        self.trace: Trace = []
        self.calls = 0

    def initialize(self, *arguments: Any) -> None:
        self.began = time.perf_counter()

    def forward(self, candidate: Tensor, *arguments: Any) -> Tensor:
        self.calls += 1
        if self.calls % self.every == 0:
            found = self.base.denormalize(candidate.detach()).clamp(0, 1)
            self.trace.append((time.perf_counter() - self.began, float(psnr_db(found, self.truth).mean())))
        return candidate.new_zeros(())


def breaching_attack(
    base: BaseModel,
    attack: str,
    overrides: list[str],
    gradients: dict[str, Tensor],
    label: Tensor,
    truth: Tensor,
    every: int,
) -> tuple[Tensor, float, Trace]:
    """One image by one of breaching's attacks, as its notebooks call them: image, seconds, trace."""
    import breaching

    with open("/dev/null", "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            config = breaching.get_attack_config(attack, overrides)
        finally:
            sys.stdout = stdout
    model = Wrapped(copy.deepcopy(base.model).requires_grad_(True))
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config)
    metadata = SimpleNamespace(shape=base.input_shape, mean=base.mean, std=base.std, modality="vision")
    payload = [{"parameters": list(model.parameters()), "buffers": list(model.buffers()), "metadata": metadata}]
    about = {"num_data_points": 1, "labels": label, "local_hyperparams": None}
    shared = [{"gradients": list(gradients.values()), "buffers": None, "metadata": about}]
    recorder = Recorder(base, truth, every)
    if hasattr(attacker, "regularizers"):
        attacker.regularizers.append(recorder)
    began = time.perf_counter()
    found, _ = attacker.reconstruct(payload, shared, {})
    seconds = time.perf_counter() - began
    return base.denormalize(found["data"].detach()).clamp(0, 1), seconds, recorder.trace


def breaching_on_all(
    base: BaseModel,
    attack: str,
    overrides: list[str],
    gradients: list[dict[str, Tensor]],
    labels: Tensor,
    images: Tensor,
) -> dict[str, Any]:
    every, found, seconds, traces = 5, [], 0.0, []
    for i, one in enumerate(gradients):
        torch.manual_seed(i)
        image, spent, trace = breaching_attack(
            base, attack, overrides, one, labels[i : i + 1], images[i : i + 1], every
        )
        found.append(image)
        seconds += spent
        traces.append(trace)
    # breaching inverts the images one by one, so the time of k steps of every image is the sum over the images.
    trace = [
        (sum(p[0] for p in points), sum(p[1] for p in points) / len(points)) for points in zip(*traces, strict=True)
    ]
    return result(torch.cat(found), images, seconds, trace)


def matching_on_all(
    base: BaseModel, config: MatchingConfig, gradients: list[dict[str, Tensor]], labels: Tensor, images: Tensor
) -> dict[str, Any]:
    names = list(gradients[0])
    observed = Gradient({name: torch.stack([one[name] for one in gradients]) for name in names})
    trace: Trace = []
    began = time.perf_counter()

    def watch(best: Tensor) -> None:
        trace.append((time.perf_counter() - began, float(psnr_db(best[:, 0], images).mean())))

    start = torch.stack([breaching_start(base, i) for i in range(len(images))])
    found = match(base, GradientObjective(observed), start, labels, config, "matching", "", watch=watch)
    return result(found.images, images, time.perf_counter() - began, trace)


def breaching_start(base: BaseModel, seed: int) -> Tensor:
    """What breaching draws after `torch.manual_seed(seed)`: normal in the model's own units."""
    torch.manual_seed(seed)
    return base.denormalize(torch.randn(1, *base.input_shape))[0].clamp(0, 1)


def result(found: Tensor, images: Tensor, seconds: float, trace: Trace) -> dict[str, Any]:
    each = psnr_db(found, images)
    return {
        "psnr_db": round(float(each.mean()), 2),
        "psnr_db_each": [round(float(p), 2) for p in each],
        "seconds": round(seconds, 2),
        "trace": [[round(t, 2), round(p, 2)] for t, p in trace],
    }


def first_reached(outcome: dict[str, Any], level: float) -> float | None:
    return next((t for t, p in outcome["trace"] if p >= level), None)


def race(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """When each first reached breaching's best PSNR less a margin, and the ratio of the two times."""
    best = max(p for _, p in theirs["trace"])
    lines = {}
    for margin in (0.0, 0.5, 1.0):
        level = best - margin
        a, b = first_reached(theirs, level), first_reached(ours, level)
        lines[f"{level:.2f} dB"] = {"breaching_s": a, "ours_s": b, "ratio": None if b is None else round(a / b, 2)}
    return lines


def compare_conv(steps: int, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    base = conv_base(seed=0)
    images, labels = images_of(base, count)
    gradients = exact_gradients(base, images, labels, [name for name, _ in base.model.named_parameters()])
    config = replace(CONV, steps=max(1, steps // FEWER))
    ours = matching_on_all(base, config, gradients, labels, images)
    say(f"ConvNet, match: {ours['psnr_db']} dB in {ours['seconds']} s")
    overrides = [f"optim.max_iterations={steps}"]
    theirs = breaching_on_all(base, "invertinggradients", overrides, gradients, labels, images)
    say(f"ConvNet, breaching invertinggradients: {theirs['psnr_db']} dB in {theirs['seconds']} s")
    gray = result(images.mean((1, 2, 3), keepdim=True).expand_as(images), images, 0.0, [])
    say(f"ConvNet, control, every image's own mean gray: {gray['psnr_db']} dB")
    outcome = {"match": ours, "breaching invertinggradients": theirs, "control: own mean gray": gray}
    return {**outcome, "race": race(theirs, ours)}


def compare_vit(steps: int, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    base = load_base("embedded")
    images, labels = images_of(base, count)
    gradients = exact_gradients(base, images, labels, [name for name, _ in base.model.named_parameters()])
    outcome: dict[str, Any] = {}
    for found in closed_forms(base, gradients):
        outcome[found.route] = result(found.images, images, found.seconds, [])
    config = replace(VIT, steps=steps)
    outcome["match"] = matching_on_all(base, config, gradients, labels, images)
    overrides = [f"optim.max_iterations={steps}"]
    theirs = breaching_on_all(base, "invertinggradients", overrides, gradients, labels, images)
    outcome["breaching invertinggradients"] = theirs
    try:
        outcome["breaching april_analytic"] = breaching_on_all(base, "april_analytic", [], gradients, labels, images)
    except AssertionError:
        outcome["breaching april_analytic"] = {
            "refused": "it needs a first block without norm and residual (its ModifiedBlock)"
        }
    for name, one in outcome.items():
        say(f"embedded ViT, {name}: " + (one.get("refused") or f"{one['psnr_db']} dB in {one['seconds']} s"))
    outcome["race"] = race(theirs, outcome["match"])
    return outcome


def closed_forms(base: BaseModel, gradients: list[dict[str, Tensor]]) -> list[Reconstruction]:
    problem = Problem(base, gradients=gradients)
    return run_routes(problem, verdicts_of(problem), ["attention_rowspace", "patch_position"]).found()


def compare_april(count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The embedded ViT with its first block replaced by breaching's ModifiedBlock, which april_analytic asks for."""
    from breaching.cases.models.model_preparation import ModifiedBlock

    base = load_base("embedded")
    base.model.blocks[0].drop_path = nn.Identity()  # a name that this timm no longer has
    base.model.blocks[0] = ModifiedBlock(base.model.blocks[0])
    images, labels = images_of(base, count)
    gradients = exact_gradients(base, images, labels, [name for name, _ in base.model.named_parameters()])
    theirs = breaching_on_all(base, "april_analytic", [], gradients, labels, images)
    outcome = {"breaching april_analytic": theirs}
    for found in closed_forms(base, gradients):
        outcome[found.route] = result(found.images, images, found.seconds, [])
    for name, one in outcome.items():
        say(f"ViT with ModifiedBlock, {name}: {one['psnr_db']} dB in {one['seconds']} s")
    return outcome


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of every search, on each image")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--only", choices=["conv", "vit", "april"])
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    logging.disable(logging.WARNING)

    def say(line: str) -> None:
        print(line, flush=True)

    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "command": " ".join(sys.argv[1:])}
    record: dict[str, Any] = {**about, "steps": asked.steps, "images": asked.images}
    parts = {
        "conv": lambda: compare_conv(asked.steps, asked.images, say),
        "vit": lambda: compare_vit(asked.steps, asked.images, say),
        "april": lambda: compare_april(asked.images, say),
    }
    for name, part in parts.items():
        if asked.only in (None, name):
            record[name] = part()
            for level, times in record[name].get("race", {}).items():
                say(f"  {level}: breaching {times['breaching_s']} s, match {times['ours_s']} s, ratio {times['ratio']}")
            if asked.json:
                write_json(asked.json, record)


if __name__ == "__main__":
    main()
