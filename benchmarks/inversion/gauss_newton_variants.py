"""Gauss-Newton where a victim differs in one thing from the protocol's default: rank, layers, recipe, file or model.

    python benchmarks/inversion/gauss_newton_variants.py --list
    python benchmarks/inversion/gauss_newton_variants.py --only "T = 2" "b = 2" --json FILE
    python benchmarks/inversion/gauss_newton_variants.py --starts nearby --victims 20 --device cuda --json FILE

Victims are trained by `simulate`, which equals PEFT. The attacker knows A before the first step, and also the recipe,
unless a victim takes one plain step, whose update the recipe only scales. Each victim is searched for from two starts:
`nearby`, the start of an attacker (route `amortised_nearby`), for victims that own one image, from pairs that are
trained by the victim's recipe; and `oracle`, the original plus smooth noise at --oracle-db, with the true label. The
oracle is not an attack: it separates the reach of the search from the quality of the start. Searches for one plain step
run side by side, the others one by one. Rows are written as they come; those in the file are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.inversion.exactness import Bound
from r2f_ext.inversion.gauss_newton import gauss_newton
from r2f_ext.inversion.label_by_label import invert_by_label, invert_nearby
from r2f_ext.inversion.matrix_free import MatrixFreeConfig, ProxyCoordinates, search_matrix_free
from r2f_ext.inversion.near_images import generated_nearby
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.side_by_side import CPU_TOGETHER
from r2f_ext.inversion.start import start_among
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.unrolled_search import UnrolledSearch
from r2f_ext.inversion.update_map import SUBSPACE_IMAGES, Subspace, UpdateMap, flat_units
from r2f_ext.models import load_base
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.pairs import Training, Victims, simulate
from r2f_ext.types import AdaptedLayer, BaseModel, Reconstruction, Target

LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ONE_STEP = Training()


Found = tuple[Search, Bound]
Find = Callable[[int, Tensor, Tensor, Tensor | None], Found]  # victim, start, labels, the start's errors on proxies


def embedded(device: str) -> BaseModel:
    return load_base(device=device)


def vit_b16_at_32(device: str) -> BaseModel:
    """ViT-B/16 for 32x32 images and 10 classes, random weights."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=10, pretrained=False).eval().to(device)
    unfuse_attention(model)
    half = (0.5, 0.5, 0.5)
    return BaseModel(model.requires_grad_(False), "timm:vit_base_patch16_224", (3, 32, 32), half, half, 10)


@dataclass(frozen=True)
class Case:
    """How a victim differs from the default; `exact_gradients`: it shares full gradients of the layers, no adapter."""

    rank: int = 8
    layers: tuple[str, ...] = LINEAR
    blocks: tuple[int, ...] = (0, 1, 2, 3)
    training: Training = field(default_factory=Training)
    storage: torch.dtype = torch.float32
    private: str = "embedded"
    proxy: str | None = None
    base: Callable[[str], BaseModel] = embedded
    exact_gradients: bool = False

    @property
    def has_estimate(self) -> bool:
        """Whether the amortised route applies: one image, and an adapter."""
        return self.training.owned == 1 and not self.exact_gradients


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
    """The images that are searched for, the starts, and the search.

    Attributes:
        originals: [V, owned, c, h, w]; starts: name -> Start.
        search: (victims, start) -> (victim, result) for each victim, as its search ends.
    """

    originals: Tensor
    starts: dict[str, Start]
    search: Callable[[list[int], Start], Iterator[tuple[int, Found]]]


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CASES), help="cases, see --list")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    parser.add_argument("--starts", nargs="+", choices=("nearby", "oracle"), default=["nearby", "oracle"])
    parser.add_argument("--victims", type=int, default=8)
    parser.add_argument("--numbers", type=int, nargs="+", metavar="N", help="only these of the victims; from 0 on")
    parser.add_argument("--proxy", default="fashion-mnist")
    parser.add_argument("--oracle-db", type=float, default=26.0)
    parser.add_argument("--passes", type=int, default=20, help="of one search, at most")
    parser.add_argument("--minutes", type=float, help="after which a search with a dense Jacobian begins no other pass")
    parser.add_argument("--without-bounds", action="store_true", help="of images that are searched for one by one")
    parser.add_argument("--start-images", type=int, help="most public images of a label that a start is made from")
    parser.add_argument(
        "--generated", type=int, default=8000, help="images of the procedural proxy, used for any label"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return
    unknown = [name for name in options.only if name not in CASES]
    if unknown:
        parser.error(f"there is no case '{unknown[0]}': see --list")
    if options.numbers and not set(options.numbers) <= set(range(options.victims)):
        parser.error(f"victims are numbered from 0 to {options.victims - 1}")
    path = Path(options.json) if options.json else None
    record = json.loads(path.read_text()) if path and path.exists() else {"rows": []}
    for name in options.only:
        for row in rows_of(name, record["rows"], options):
            print(row, flush=True)
            record["rows"].append(row)
            record["summary"] = summary(record["rows"])
            if path:
                write_json(path, record)
    for line in summary(record["rows"]):
        print(line)


def rows_of(name: str, known: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a case that are not known yet, as they come."""
    case = CASES[name]
    wanted = [s for s in options.starts if s == "oracle" or case.has_estimate]
    done = {(row["start"], row["victim"]) for row in known if row["case"] == name}
    victims = range(options.victims) if options.numbers is None else options.numbers
    missing = {start: [victim for victim in victims if (start, victim) not in done] for start in wanted}
    if not any(missing.values()):
        return
    problem = posed(case, options, [s for s in wanted if missing[s]])
    for start, victims in missing.items():
        psnr = psnr_db(problem.starts[start].images.flatten(0, 1), problem.originals.flatten(0, 1))
        print(f"{name}, {start}: {psnr.mean():.2f} dB in the mean of {len(psnr)} starts", flush=True)
        for victim, found in problem.search(victims, problem.starts[start]) if victims else ():
            yield {"case": name, "start": start, "victim": victim, **row_of(problem, start, victim, *found)}


def row_of(problem: Problem, start: str, victim: int, found: Search, bound: Bound) -> dict[str, Any]:
    original, image = problem.originals[victim], problem.starts[start].images[victim]
    return {
        "start_psnr_db": float(psnr_db(image, original).mean()),
        "psnr_db": float(psnr_db(found.image.view_as(original), original).mean()),
        "start_residual": found.start_residual,
        "residual": found.residual,
        "said_exact": None if isnan(bound.free) else bound.exact,  # None: there is no bound
        "bound_db": None if isnan(bound.db) else bound.db,
        "passes": found.passes,
        "stopped": found.stopped,
        "seconds": found.seconds,
    }


def posed(case: Case, options: argparse.Namespace, starts: list[str]) -> Problem:
    """Train the victims, make the starts, and choose the search."""
    base, owned = case.base(options.device), case.training.owned
    proxy = case.proxy or options.proxy
    private = load_images(case.private, role="private", count=options.victims * owned)
    generated = options.generated if proxy == "procedural" else None
    public = drop_private(load_images(proxy, count=generated), private)
    some = public.take(torch.arange(min(SUBSPACE_IMAGES, len(public)))).batch(slice(None), base.device)
    images = private.batch(slice(None), base.device).unflatten(0, (-1, owned))
    labels = private.labels.to(base.device).unflatten(0, (-1, owned))
    target = target_of(base, case)
    a0 = initial_a(target)
    victims = begun = None
    if not case.exact_gradients:
        victims = stored(simulate(target, a0, images, labels, case.training), case.storage)
    if victims is not None and "nearby" in starts:
        begun = start_among(some, estimated(case, target, a0, victims, public, private, options.start_images))
    subspace = Subspace.of(some) if begun is None else begun.subspace
    made = {"oracle": Start(near(images, subspace, options.oracle_db), labels)}
    if begun is not None:
        found = begun.estimate
        assert found.labels is not None
        made["nearby"] = Start(found.images[:, None], found.labels[:, None], found.loo_errors)
    config = GaussNewtonConfig(passes=options.passes, minutes=options.minutes)
    if victims is None:
        search = one_by_one(from_gradients(target, images, labels, subspace, options.passes))
    elif case.training == ONE_STEP:
        search = side_by_side_search(target, victims, subspace, config)
    else:
        search = one_by_one(from_training(case, target, a0, victims, subspace, config, not options.without_bounds))
    return Problem(images, made, search)


def target_of(base: BaseModel, case: Case) -> Target:
    modules = dict(base.model.named_modules())
    names = [f"blocks.{block}.{layer}" for block in case.blocks for layer in case.layers]
    layers = [AdaptedLayer(n, *modules[n].weight.shape, case.rank, 16 / case.rank) for n in names]  # type: ignore
    return Target(base, tuple(layers))


def initial_a(target: Target) -> dict[str, Tensor]:
    """As PEFT draws it: uniform to 1 / sqrt(d_in)."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer.name: ((2 * torch.rand(layer.rank, layer.d_in, generator=generator) - 1) / layer.d_in**0.5).to(
            target.base.device
        )
        for layer in target.layers
    }


def stored(victims: Victims, dtype: torch.dtype) -> Victims:
    """What a file of that precision holds."""
    a, b = ({name: t.to(dtype).float() for name, t in factors.items()} for factors in (victims.a, victims.b))
    return replace(victims, a=a, b=b)


def one_by_one(find: Find) -> Callable[[list[int], Start], Iterator[tuple[int, Found]]]:
    def search_each(victims: list[int], start: Start) -> Iterator[tuple[int, Found]]:
        for victim in victims:
            label = start.labels[victim]
            yield victim, find(victim, start.images[victim].flatten(), label, start.loo_errors.get(int(label[0])))

    return search_each


def side_by_side_search(
    target: Target, victims: Victims, subspace: Subspace, config: GaussNewtonConfig
) -> Callable[[list[int], Start], Iterator[tuple[int, Found]]]:
    """The search of the route itself. If the image of a search does not replace its start, the start is returned."""
    a = {name: each[0] for name, each in victims.a.items()}

    def search_all(chosen: list[int], start: Start) -> Iterator[tuple[int, Found]]:
        together = len(chosen) if target.base.device.type == "cuda" else CPU_TOGETHER
        for some in (chosen[first : first + together] for first in range(0, len(chosen), together)):
            rows = torch.tensor(some, device=target.base.device)
            begin = Reconstruction(
                *("given", start.images[rows, 0], start.labels[rows, 0], "", 0.0), loo_errors=start.loo_errors
            )
            observed = {name: -each[rows] for name, each in victims.b.items()}
            found = gauss_newton(target, a, observed, begin, subspace, config)
            for place, victim in enumerate(some):
                known = {name: float(each[place]) for name, each in found.per_victim.items()}
                bound = Bound(known["bound_db"], known["free_directions"], known["misfit"])
                passes, stopped = int(known["passes"]), bool(known["stopped"])
                left = known["residual"], known["start_residual"]
                yield victim, (Search(found.images[place], *left, passes, stopped, known["search_seconds"]), bound)

    return search_all


def from_training(
    case: Case,
    target: Target,
    a0: dict[str, Tensor],
    victims: Victims,
    subspace: Subspace,
    config: GaussNewtonConfig,
    bounds: bool,
) -> Find:
    searches = UnrolledSearch(target, a0, case.training, subspace, config)

    def find(victim: int, start: Tensor, labels: Tensor, errors: Tensor | None) -> Found:
        a, b = ({name: each[victim] for name, each in factors.items()} for factors in (victims.a, victims.b))
        found = searches.find(a, b, start, labels, errors)
        judged = bounds and found.improved and case.training.owned == 1  # no bound for several images
        return found, searches.bound(a, b, found.image, labels) if judged else Bound()

    return find


def from_gradients(target: Target, images: Tensor, labels: Tensor, subspace: Subspace, passes: int) -> Find:
    """A search from exact gradients G of the layers, read as G A^T with a random A: 8 numbers of each row suffice."""
    a, coordinates, config = initial_a(target), ProxyCoordinates(subspace), MatrixFreeConfig(points=passes)
    updates = UpdateMap(target, a, torch.Size(target.base.input_shape), GaussNewtonConfig().directions)

    def find(victim: int, start: Tensor, label: Tensor, errors: Tensor | None) -> Found:
        with Capture(target) as capture:
            gradient = capture(images[victim][None], labels[victim][None])
        observed = flat_units(project(target, gradient, a))[0]
        return search_matrix_free(updates, observed, start, label, coordinates, config), Bound()

    return find


def estimated(
    case: Case,
    target: Target,
    a0: dict[str, Tensor],
    victims: Victims,
    public: ImageSet,
    private: ImageSet,
    most: int | None,
) -> Reconstruction:
    """The estimate of the route `amortised_nearby` from pairs of the victims' recipe."""
    began = time.perf_counter()
    observed = {name: -b for name, b in victims.b.items()}
    training = None if case.training == ONE_STEP else case.training
    first = invert_by_label(target, a0, public, observed, most=most, training=training).reconstruction
    generated = generated_nearby(target.base, public.name)
    found = invert_nearby(target, a0, public, observed, first, generated, private.images, most=most, training=training)
    print(f"amortised start: {time.perf_counter() - began:.0f} s", flush=True)
    return found


def near(images: Tensor, subspace: Subspace, decibels: float) -> Tensor:
    """The originals, with noise like the differences between proxies at that PSNR (a little better where clamped)."""
    generator = torch.Generator().manual_seed(0)
    flat = images.flatten(2)
    noise = torch.randn(*flat.shape[:2], subspace.basis.shape[1], generator=generator).to(images) @ subspace.basis.T
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
                "psnr_db_median": float(psnr.quantile(0.5)),
                "at_least_40_db": float((psnr >= 40).float().mean()),
                "bounded": sum(row["said_exact"] is not None for row in own),
                "said_exact": sum(row["said_exact"] is True for row in own),
                "wrongly_said_exact": sum(row["said_exact"] is True and row["psnr_db"] < 40 for row in own),
                "seconds_mean": sum(row["seconds"] for row in own) / len(own),
            }
        )
    return lines


if __name__ == "__main__":
    main()
