"""How often the word "exact" is wrong: searches whose image is known, and the bound that is claimed for each.

    python benchmarks/inversion/exactness_study.py --victims 16 --json benchmarks/results/0.1.0/exactness.json
    python benchmarks/inversion/exactness_study.py --base embedded --victims 1 --json FILE

Each case violates one assumption of the search: layers that do not determine the image, files in half precision,
batches, labels, recipes, images at the edge of the pixel range. A search begins at the original plus noise of 25 to 40
dB within the variation of the proxies; in the cases "displaced" half of the noise is in all pixels instead, and so also
along directions that the update does not see. Such a start is an oracle, not an attack: the study tests the claim at
the end. A claim is wrong if the true PSNR is below the bound; for a batch the PSNR is that to its nearest image. The
victims' base is a random ViT for 12x12 images (--base tiny), or the embedded one. Rows are written as they come; those
in the file are not computed again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import load_images
from r2f_ext.inversion.exactness import exactness_of
from r2f_ext.inversion.gauss_newton import gauss_newton
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.update_map import Subspace
from r2f_ext.models import load_base
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.pairs import Training, simulate
from r2f_ext.types import AdaptedLayer, BaseModel, Reconstruction, Target

LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BEHIND_ATTENTION = LINEAR[1:]
PROXIES = 600
PASSES = 10  # of one search, at most
TOGETHER = 10  # victims of one start


def as_they_are(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class Case:
    """How a victim and its search differ from the default.

    Attributes:
        layers, last_only, rank: of the adapter; storage: of its file.
        change: applied to the images [n, c, h, w]; beside: makes a batch's second image from the first and another.
        displaced: whether the noise of starts also leaves the variation of the proxies.
        other_label: whether the search is told another label.
    """

    layers: tuple[str, ...] = LINEAR
    last_only: bool = False
    rank: int = 8
    storage: torch.dtype = torch.float32
    training: Training = field(default_factory=Training)
    change: Callable[[Tensor], Tensor] = as_they_are
    beside: Callable[[Tensor, Tensor], Tensor] | None = None
    displaced: bool = False
    other_label: bool = False

    @property
    def doubt(self) -> str | None:
        """The doubt that an audit derives from the configuration or the factors of the adapter."""
        if self.training.dropout:
            return "it was trained with dropout"
        return "B shows signs only" if self.training.optimizer == "adamw" else None


def near_black(images: Tensor) -> Tensor:
    return (0.3 * images - 0.1).clamp_min(0)


def constant(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3), keepdim=True).expand_as(images).contiguous()


def same(images: Tensor, others: Tensor) -> Tensor:
    return images


def nearly(images: Tensor, others: Tensor) -> Tensor:
    return (images + 0.003 * torch.randn_like(images)).clamp(0, 1)


def another(images: Tensor, others: Tensor) -> Tensor:
    return others


CASES = {
    "default": Case(),
    "r = 4": Case(rank=4),
    "class token": Case(BEHIND_ATTENTION, last_only=True),
    "class token, displaced": Case(BEHIND_ATTENTION, last_only=True, displaced=True),
    "fc2 alone, r = 32": Case(("mlp.fc2",), last_only=True, rank=32),
    "fc2 alone, r = 32, displaced": Case(("mlp.fc2",), last_only=True, rank=32, displaced=True),
    "qkv of the last block": Case(("attn.qkv",), last_only=True),
    "displaced": Case(displaced=True),
    "near black": Case(change=near_black),
    "constant": Case(change=constant),
    "bfloat16 file": Case(storage=torch.bfloat16),
    "float16 file": Case(storage=torch.float16),
    "wrong label": Case(other_label=True),
    "dropout": Case(training=Training(dropout=0.1)),
    "AdamW, first step": Case(training=Training(optimizer="adamw", lr=1e-3)),
    "two steps": Case(training=Training(steps=2, lr=0.1)),
    "batch, the same image twice": Case(training=Training(batch=2), beside=same),
    "batch, nearly the same image twice": Case(training=Training(batch=2), beside=nearly),
    "batch of two": Case(training=Training(batch=2), beside=another),
    "batch of two, class token": Case(
        BEHIND_ATTENTION, last_only=True, training=Training(batch=2), beside=another, displaced=True
    ),
}


def main() -> None:
    parser = json_parser(__doc__, required=True)
    parser.add_argument("--base", choices=("tiny", "embedded"), default="tiny")
    parser.add_argument("--victims", type=int, default=16, help="of each case")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CASES), help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    path = Path(options.json)
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    done = {(row["base"], row["case"], row["victim"]) for row in record["rows"]}
    base = tiny_base() if options.base == "tiny" else load_base("embedded")
    for name in options.only:
        missing = [v for v in range(options.victims) if (options.base, name, v) not in done]
        for some in (missing[first : first + TOGETHER] for first in range(0, len(missing), TOGETHER)):
            for row in searched(base, CASES[name], some):
                print({"case": name, **row}, flush=True)
                record["rows"].append({"base": options.base, "case": name, **row})
            write_json(path, record | {"summary": summary(record["rows"])})
    record["summary"] = summary(record["rows"])
    write_json(path, record)
    for line in record["summary"]:
        print(line)


def tiny_base() -> BaseModel:
    """A random ViT for 12x12 images of one channel: patch 4, d = 24, 2 blocks, all parameters off their start."""
    torch.manual_seed(3)
    size = {"img_size": 12, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = VisionTransformer(num_classes=5, **size).eval()  # type: ignore[arg-type]
    unfuse_attention(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return BaseModel(model.requires_grad_(False), "tiny", (1, 12, 12), (0.5,), (0.25,), 5)


def searched(base: BaseModel, case: Case, victims: list[int]) -> Iterator[dict[str, Any]]:
    """Train victims of one start, search from near their images, and compare the claims with the truth."""
    torch.manual_seed(1000 + victims[0])
    target, a = adapter(base, case)
    public = pictures(base, PROXIES + max(victims) + 2)
    subspace = Subspace.of(public[:PROXIES])
    own = case.change(public[[PROXIES + victim for victim in victims]])
    other = case.change(public[[PROXIES + victim + 1 for victim in victims]])
    groups = own[:, None] if case.beside is None else torch.stack([own, case.beside(own, other)], dim=1)
    labels = torch.randint(base.num_classes, (len(victims),))
    made = simulate(target, a, groups, labels[:, None].expand(-1, groups.shape[1]), case.training)
    stored = {name: -b.to(case.storage).float() for name, b in made.b.items()}
    stored_a = {name: each.to(case.storage).float() for name, each in a.items()}
    starts = torch.stack([start_near(image, subspace, case.displaced) for image in own])
    start = Reconstruction("oracle", starts, (labels + case.other_label) % base.num_classes, "", 0.0)
    found = gauss_newton(target, stored_a, stored, start, subspace, GaussNewtonConfig(passes=PASSES), doubt=case.doubt)
    for row, victim in enumerate(victims):
        said = exactness_of(found, row)
        image, group = found.images[row, None], groups[row]
        truth = float(psnr_db(image.expand_as(group), group).max())
        yield {
            "victim": victim,
            "start_psnr_db": float(psnr_db(starts[row, None], own[row, None])),
            "psnr_db": truth,
            "residual": float(found.per_victim["residual"][row]),
            "misfit": float(found.per_victim["misfit"][row]),
            "exact": said.exact,
            "bound_db": said.bound_db,
            "free_directions": said.free_directions,
            "words": said.words,
            "wrong": said.bound_db is not None and truth < said.bound_db,
        }


def adapter(base: BaseModel, case: Case) -> tuple[Target, dict[str, Tensor]]:
    """The adapted layers, and A as PEFT draws it."""
    depth = len(list(base.model.get_submodule("blocks").children()))
    names = [
        f"blocks.{b}.{layer}" for b in range(depth) for layer in case.layers if b == depth - 1 or not case.last_only
    ]
    weights = {name: base.model.get_parameter(f"{name}.weight") for name in names}
    layers = (AdaptedLayer(name, len(each), each.shape[1], case.rank, 2.0) for name, each in weights.items())
    target = Target(base, tuple(layers))
    return target, {n.name: (2 * torch.rand(n.rank, n.d_in) - 1) / n.d_in**0.5 for n in target.layers}


def pictures(base: BaseModel, count: int) -> Tensor:
    """Generated images [count, c, h, w] of the base's size; of the embedded base its own public and private ones."""
    if base.spec == "embedded":
        own = load_images("embedded", role="private").batch(slice(None))
        return torch.cat([load_images("embedded", count=PROXIES).batch(slice(None)), own[: count - PROXIES]])
    images = load_images("procedural", input_shape=base.input_shape, num_classes=base.num_classes, count=count)
    return images.batch(slice(None))


def start_near(image: Tensor, subspace: Subspace, displaced: bool) -> Tensor:
    """The image [c, h, w] moved by noise of 25 to 40 dB along the subspace, and, if displaced, in all pixels."""
    shift = subspace.basis @ torch.randn(subspace.basis.shape[1])
    if displaced:
        shift = shift / shift.norm() + torch.nn.functional.normalize(torch.randn(len(shift)), dim=0)
    size = 10 ** (-(25 + 15 * float(torch.rand(()))) / 20) * len(shift) ** 0.5
    return (image + (shift * (size / shift.norm())).view_as(image)).clamp(0, 1)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By base and case: searches, how many ended exact or with a bound, and how many claims were wrong."""
    lines = []
    for key in dict.fromkeys((row["base"], row["case"]) for row in rows):
        own = [row for row in rows if (row["base"], row["case"]) == key]
        margins = [row["psnr_db"] - row["bound_db"] for row in own if row["bound_db"] is not None]
        lines.append(
            {
                "base": key[0],
                "case": key[1],
                "searches": len(own),
                "exact": sum(row["exact"] for row in own),
                "bounded": len(margins),
                "wrong": sum(row["wrong"] for row in own),
                "least_margin_db": min(margins, default=None),
                "psnr_db": [min(row["psnr_db"] for row in own), max(row["psnr_db"] for row in own)],
            }
        )
    return lines


if __name__ == "__main__":
    main()
