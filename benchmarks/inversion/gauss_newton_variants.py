"""Gauss-Newton where a victim differs in one thing from the protocol's default: rank, layers, recipe, file or model.

    python benchmarks/inversion/gauss_newton_variants.py --list
    python benchmarks/inversion/gauss_newton_variants.py --only "T = 2" "b = 2" --json FILE
    python benchmarks/inversion/gauss_newton_variants.py --json benchmarks/results/0.1.0/gauss_newton_variants.json

Victims are trained by `simulate`, which equals PEFT. The attacker knows A before the first step and, where one plain
step does not cancel it, the recipe. Each victim is searched for from two starts: `amortised`, the attacker's own, where
that route exists; and `oracle`, the original plus smooth noise at --oracle-db and its true label, which separates the
reach of the search from the quality of the start. An oracle is not an attack. No case begins another search after
--minutes; rows are written as they come, and those that are in the file already are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.capture import Capture
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.inversion.amortised import invert_by_label
from r2f_ext.inversion.exactness import REPRODUCED
from r2f_ext.inversion.gauss_newton import search
from r2f_ext.inversion.matrix_free import GradientMap, MatrixFreeConfig, ProxyCoordinates, search_matrix_free
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.side_by_side import GaussNewtonConfig
from r2f_ext.inversion.unrolled import UnrolledMap, first_adamw_step, movement_weights, side_by_side
from r2f_ext.inversion.update_map import SUBSPACE_IMAGES, Subspace, UpdateMap, flat_units
from r2f_ext.models import load_base
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.pairs import Training, Victims, simulate
from r2f_ext.types import AdaptedLayer, BaseModel, Target

LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
DIRECTIONS = 64
ONE_STEP = Training()


Find = Callable[[int, Tensor, Tensor, Tensor | None], Search]


@dataclass(frozen=True)
class Case:
    """How a victim differs; `exact_gradients`: it shares the layers' full gradients, not an adapter."""

    rank: int = 8
    layers: tuple[str, ...] = LINEAR
    blocks: tuple[int, ...] = (0, 1, 2, 3)
    training: Training = field(default_factory=Training)
    storage: torch.dtype = torch.float32
    private: str = "embedded"
    proxy: str | None = None
    base: Callable[[], BaseModel] = load_base
    exact_gradients: bool = False

    @property
    def reads_adamw(self) -> bool:
        return self.training.optimizer == "adamw" and self.training.steps == 1

    @property
    def has_amortised(self) -> bool:
        """Whether the amortised route applies: one image, and an update close to that of a plain SGD step."""
        return self.training.owned == 1 and self.training.optimizer == "sgd" and not self.exact_gradients


def vit_b16_at_32() -> BaseModel:
    """ViT-B/16 for 32x32 images and 10 classes, random weights."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=10, pretrained=False).eval()
    unfuse_attention(model)
    half = (0.5, 0.5, 0.5)
    return BaseModel(model.requires_grad_(False), "timm:vit_base_patch16_224", (3, 32, 32), half, half, 10)


CASES = {
    "default": Case(),
    "r = 2": Case(rank=2),
    "r = 4": Case(rank=4),
    "r = 16": Case(rank=16),
    "qkv only": Case(layers=("attn.qkv",)),
    "last block only": Case(blocks=(3,)),
    "bfloat16 file": Case(storage=torch.bfloat16),
    "faces, procedural proxy": Case(private="lfw", proxy="procedural"),
    "T = 2": Case(training=Training(steps=2, lr=0.01)),
    "T = 5": Case(training=Training(steps=5, lr=0.01)),
    "T = 2, an image each": Case(training=Training(steps=2, samples=2, lr=0.01)),
    "T = 2, momentum": Case(training=Training(steps=2, lr=0.01, momentum=0.9)),
    "b = 2": Case(training=Training(batch=2)),
    "T = 2, b = 2": Case(training=Training(steps=2, batch=2, lr=0.01)),
    "AdamW, first step": Case(training=Training(optimizer="adamw", lr=1e-3)),
    "AdamW, T = 2": Case(training=Training(steps=2, optimizer="adamw", lr=1e-3)),
    "ViT-B/16 at 32x32, exact gradients": Case(blocks=tuple(range(12)), base=vit_b16_at_32, exact_gradients=True),
}


@dataclass(frozen=True)
class Start:
    """Images [V, owned, c, h, w] in [0, 1] and labels [V, owned] that searches begin from."""

    images: Tensor
    labels: Tensor
    loo_errors: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """What is searched for, and how.

    Attributes:
        originals: [V, owned, c, h, w]; starts: name -> Start.
        find: (victim, start point, labels, what the start gets wrong on proxies) -> Search.
    """

    originals: Tensor
    starts: dict[str, Start]
    find: Find


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CASES), help="cases, see --list")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--starts", nargs="+", choices=("amortised", "oracle"), default=["amortised", "oracle"])
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--proxy", default="fashion-mnist")
    parser.add_argument("--oracle-db", type=float, default=26.0)
    parser.add_argument("--passes", type=int, default=20, help="of one search, at most")
    parser.add_argument("--minutes", type=float, default=15.0, help="after which a case begins no other search")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return
    unknown = [name for name in options.only if name not in CASES]
    if unknown:
        parser.error(f"there is no case '{unknown[0]}': see --list")
    path = Path(options.json) if options.json else None
    record = json.loads(path.read_text()) if path and path.exists() else {"rows": []}
    for name in options.only:
        print(f"{name}: at most {options.minutes:g} minutes and the search that is then under way", flush=True)
        for row in rows_of(name, record["rows"], options):
            print(row, flush=True)
            record["rows"].append(row)
            record["summary"] = summary(record["rows"])
            if path:
                write_json(path, record)
    for line in summary(record["rows"]):
        print(line)


def rows_of(name: str, known: list[dict[str, Any]], options: argparse.Namespace) -> Any:
    """The rows of a case that are not known yet, victim by victim, as long as there is time."""
    began, case = time.perf_counter(), CASES[name]
    wanted = [s for s in options.starts if s == "oracle" or case.has_amortised]
    done = {(row["start"], row["victim"]) for row in known if row["case"] == name}
    missing = [(s, v) for v in range(options.victims) for s in wanted if (s, v) not in done]
    if not missing:
        return
    problem = posed(case, options, wanted)
    for start, victim in missing:
        if time.perf_counter() - began > 60 * options.minutes:
            print(f"{name}: out of time", flush=True)
            return
        yield {"case": name, "start": start, "victim": victim, **one(problem, problem.starts[start], victim)}


def one(problem: Problem, start: Start, victim: int) -> dict[str, Any]:
    original, image, labels = problem.originals[victim], start.images[victim], start.labels[victim]
    began = time.perf_counter()
    found = problem.find(victim, image.flatten(), labels, start.loo_errors.get(int(labels[0])))
    seconds = time.perf_counter() - began
    return {
        "start_psnr_db": float(psnr_db(image, original).mean()),
        "psnr_db": float(psnr_db(found.image.view_as(original), original).mean()),
        "start_residual": found.start_residual,
        "residual": found.residual,
        "said_exact": found.residual < REPRODUCED,
        "passes": found.passes,
        "seconds": seconds,
    }


def posed(case: Case, options: argparse.Namespace, starts: list[str]) -> Problem:
    """Victims, what they show, and the starts."""
    base, owned = case.base(), case.training.owned
    proxy = case.proxy or options.proxy
    private = load_images(case.private, role="private", count=options.victims * owned)
    # Of the procedural proxy each image serves every label.
    public = drop_private(load_images(proxy, count=6000 if proxy == "procedural" else None), private)
    some = public.take(torch.arange(min(SUBSPACE_IMAGES, len(public))))
    subspace = Subspace.of(some.batch(slice(None)))
    images = private.batch(slice(None)).unflatten(0, (-1, owned))
    labels = private.labels.unflatten(0, (-1, owned))
    target = target_of(base, case)
    made = {"oracle": lambda: Start(near(images, subspace, options.oracle_db), labels)}
    if case.exact_gradients:
        find = from_gradients(target, images, labels, subspace, options.passes)
    else:
        a0 = initial_a(target)
        victims = stored(simulate(target, a0, images, labels, case.training), case.storage)
        find = from_adapters(case, target, a0, victims, subspace, options.passes)
        made["amortised"] = lambda: amortised(target, victims, public)
    return Problem(images, {name: made[name]() for name in starts}, find)


def target_of(base: BaseModel, case: Case) -> Target:
    modules = dict(base.model.named_modules())
    names = [f"blocks.{block}.{layer}" for block in case.blocks for layer in case.layers]
    layers = [AdaptedLayer(n, *modules[n].weight.shape, case.rank, 16 / case.rank) for n in names]  # type: ignore
    return Target(base, tuple(layers))


def initial_a(target: Target) -> dict[str, Tensor]:
    """As PEFT draws it: uniform to 1 / sqrt(d_in)."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer.name: (2 * torch.rand(layer.rank, layer.d_in, generator=generator) - 1) / layer.d_in**0.5
        for layer in target.layers
    }


def stored(victims: Victims, dtype: torch.dtype) -> Victims:
    """What a file of that precision holds."""
    a, b = ({name: t.to(dtype).float() for name, t in factors.items()} for factors in (victims.a, victims.b))
    return replace(victims, a=a, b=b)


def from_adapters(
    case: Case, target: Target, a0: dict[str, Tensor], victims: Victims, subspace: Subspace, passes: int
) -> Find:
    shape, config = target.base.input_shape, GaussNewtonConfig(passes=passes)
    subspace = side_by_side(subspace, case.training.owned)
    if case.training == ONE_STEP:
        plain = UpdateMap(target, {name: each[0] for name, each in victims.a.items()}, torch.Size(shape), DIRECTIONS)
    else:
        unrolled = UnrolledMap(target, a0, shape, ONE_STEP if case.reads_adamw else case.training, DIRECTIONS)

    def find(victim: int, start: Tensor, labels: Tensor, errors: Tensor | None) -> Search:
        a, b = ({name: each[victim] for name, each in factors.items()} for factors in (victims.a, victims.b))
        if case.training == ONE_STEP:
            observed = flat_units({name: -each[None] for name, each in b.items()})[0]
            return search(plain, observed, start, labels, subspace, config, errors)
        if case.reads_adamw:
            read = first_adamw_step(b, case.training)
            b, weighed = {name: -each for name, each in read.gradient.items()}, unrolled.weighing(read.weights)
        else:
            weighed = unrolled.weighing(a_weights=movement_weights(a0, a))
        a, b = ({name: each[None] for name, each in factors.items()} for factors in (a, b))
        return search(weighed, weighed.observation(a, b)[0], start, labels, subspace, config, errors)

    return find


def from_gradients(target: Target, images: Tensor, labels: Tensor, subspace: Subspace, passes: int) -> Find:
    """Exact gradients G of the layers, seen as G A^T through a random A: 8 numbers of each row are plenty."""
    updates, coordinates = GradientMap(target, initial_a(target), target.base.input_shape), ProxyCoordinates(subspace)
    config = MatrixFreeConfig(points=passes)

    def find(victim: int, start: Tensor, label: Tensor, errors: Tensor | None) -> Search:
        with Capture(target) as capture:
            gradient = capture(images[victim][None], labels[victim][None])
        return search_matrix_free(
            updates,
            updates.observation(updates.parts(gradient)),
            start,
            label,
            coordinates,
            config,
            lambda residual: print(f"  residual {residual:.2e}", flush=True),
        )

    return find


def amortised(target: Target, victims: Victims, public: ImageSet) -> Start:
    began = time.perf_counter()
    observed = {name: -b for name, b in victims.b.items()}
    found = invert_by_label(target, {name: a.mean(0) for name, a in victims.a.items()}, public, observed).reconstruction
    print(f"amortised start: {time.perf_counter() - began:.0f} s", flush=True)
    assert found.labels is not None
    return Start(found.images[:, None], found.labels[:, None], found.loo_errors)


def near(images: Tensor, subspace: Subspace, decibels: float) -> Tensor:
    """The originals, with noise like the differences between proxies at that PSNR (a little better where clamped)."""
    generator = torch.Generator().manual_seed(0)
    flat = images.flatten(2)
    noise = torch.randn(*flat.shape[:2], subspace.basis.shape[1], generator=generator) @ subspace.basis.T
    noise *= 10 ** (-decibels / 20) / noise.square().mean(-1, keepdim=True).sqrt()
    return (flat + noise).clamp(0, 1).view_as(images)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each case and start."""
    groups = dict.fromkeys((row["case"], row["start"]) for row in rows)
    lines = []
    for case, start in groups:
        own = [row for row in rows if (row["case"], row["start"]) == (case, start)]
        psnr = torch.tensor([row["psnr_db"] for row in own])
        lines.append(
            {
                "case": case,
                "start": start,
                "victims": len(own),
                "start_psnr_db": sum(row["start_psnr_db"] for row in own) / len(own),
                "psnr_db": float(psnr.mean()),
                "psnr_db_median": float(psnr.median()),
                "at_least_40_db": float((psnr >= 40).float().mean()),
                "said_exact": sum(row["said_exact"] for row in own),
                "wrongly_said_exact": sum(row["said_exact"] and row["psnr_db"] < 40 for row in own),
                "seconds_mean": sum(row["seconds"] for row in own) / len(own),
            }
        )
    return lines


if __name__ == "__main__":
    main()
