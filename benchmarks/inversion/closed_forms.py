"""The closed forms on full-size shapes, on the embedded model, from adapters alone, and on batches of two.

    python benchmarks/inversion/closed_forms.py --json benchmarks/results/0.1.0/closed_forms.json

Large models have timm's random weights, which need no download; only block 0 and the embeddings matter, so L/14 has two
blocks. Seconds are those of the route, without the gradient. PEFT trains the adapters in float64 by plain SGD on one
Fashion-MNIST test image; their base has 17 tokens and is trained here for 200 steps. Adapters are saved and read back.
A_0 is found by trying seeds; it is not needed if weight decay has removed it from A (rows `decay`).
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.assign import assign
from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import load_images
from r2f_ext.inversion.attention_rowspace import invert_attention_rowspace, solve_from_rows
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.geometry import QKV_WEIGHT, base_geometry
from r2f_ext.inversion.patch_position import invert_patch_position
from r2f_ext.inversion.route import Certainty, adapter_problem
from r2f_ext.inversion.routes.adapter_rowspace import AdapterRowspace
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.progress import no_progress
from r2f_ext.types import BaseModel

INVERTERS = {"patch_position": invert_patch_position, "attention_rowspace": invert_attention_rowspace}
SHAPES: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("B/16 224x224", "patch_position", {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12}, 12),
    ("L/14 224x224", "attention_rowspace", {"img_size": 224, "patch_size": 14, "embed_dim": 1024, "depth": 2}, 16),
)
STORED = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def random_vit(dtype: torch.dtype = torch.float32, **options: Any) -> BaseModel:
    torch.manual_seed(0)
    model = VisionTransformer(num_classes=10, **options).to(dtype).eval().requires_grad_(False)
    unfuse_attention(model)
    channels = options.get("in_chans", 3)
    shape = (channels, options["img_size"], options["img_size"])
    return BaseModel(model, "random", shape, (0.5,) * channels, (0.5,) * channels, 10)


def trained_seventeen(steps: int = 200) -> BaseModel:
    """A small model after a short training on Fashion-MNIST, with a new random head, in float64."""
    base = random_vit(img_size=32, patch_size=8, in_chans=1, embed_dim=96, depth=4, num_heads=4)
    proxy = load_images("embedded", count=5000)
    model = base.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.randperm(len(proxy), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        picked = order[torch.arange(64 * step, 64 * (step + 1)) % len(order)]
        optimizer.zero_grad()
        F.cross_entropy(model(base.normalize(proxy.batch(picked)[:, :1])), proxy.labels[picked]).backward()
        optimizer.step()
    torch.nn.init.normal_(base.model.get_classifier().weight, std=0.02)
    base.model.double().eval().requires_grad_(False)
    return base


def large_shapes() -> list[dict[str, Any]]:
    rows = []
    for name, route, options, heads in SHAPES:
        base = random_vit(num_heads=heads, **options)
        photo = load_images("photos", input_shape=base.input_shape, num_classes=10, count=1, role="private")
        image = photo.batch(slice(0, 1))
        (gradients,) = exact_gradients(base, image, torch.tensor([7]))
        found = INVERTERS[route](base, gradients)
        rows.append(_row(name, route, psnr_db(found.images, image), found.seconds, found.details))
    return rows


def embedded(count: int = 16) -> list[dict[str, Any]]:
    base = load_base("embedded")
    private = load_images("embedded", role="private", count=count)
    images = private.batch(slice(None))
    gradients = exact_gradients(base, images, private.labels)
    rows = []
    for route, invert in INVERTERS.items():
        found = [invert(base, one) for one in gradients]
        psnr = psnr_db(torch.cat([one.images for one in found]), images)
        worst = min((one.details for one in found), key=lambda details: details["expected_psnr_db"])
        rows.append(_row(f"embedded, {count} images", route, psnr, sum(one.seconds for one in found) / count, worst))
    return rows


def adapters() -> list[dict[str, Any]]:
    base = trained_seventeen()
    image = load_images("embedded", role="private", count=4).batch([3])[:, :1].double()
    cases = [(32, steps, stored) for steps in (2, 5, 50) for stored in STORED]
    rows = [_adapter(base, image, *case) for case in [*cases, (16, 5, "float64"), (8, 5, "float64")]]
    return rows + [_adapter(base, image, 32, steps, "float64", lr=0.5, decay=0.03) for steps in (100, 300, 700, 1500)]


def _adapter(
    base: BaseModel, image: Tensor, rank: int, steps: int, stored: str, lr: float = 0.1, decay: float = 0.0
) -> dict[str, Any]:
    torch.manual_seed(42)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["attn.qkv"])
    model = get_peft_model(copy.deepcopy(base.model), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(base.normalize(image)), torch.tensor([7])).backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.to(STORED[stored]).save_pretrained(folder)
        target, update = attach(read_adapter(folder), base)
    route, problem = AdapterRowspace(), adapter_problem(target, [update])
    verdict = route.verdict(problem)
    name = f"17 tokens, r {rank}, T {steps}, {stored}{f', decay {decay:g}' if decay else ''}"
    if verdict.certainty is Certainty.REFUSED:
        return {"case": name, "route": route.name, "psnr_db": None, "why": verdict.why}
    found = route.run(problem, no_progress)
    row = _row(name, route.name, psnr_db(found.images.double(), image), found.seconds, found.details)
    return {**row, "why": found.why}


def batch_of_two() -> list[dict[str, Any]]:
    """Both images get one estimate, from the row space; each patch has as many free directions as there are patches."""
    rows = []
    for width in (96, 128, 192):
        options = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": 2, "num_heads": 4}
        base = random_vit(torch.float64, **options)
        images = F.interpolate(load_images("embedded", role="private", count=2).batch(slice(None)), size=16).double()
        weight = base.model.get_parameter(QKV_WEIGHT).requires_grad_(True)
        loss = F.cross_entropy(base.model(base.normalize(images)), torch.tensor([3, 7]))
        (gradient,) = torch.autograd.grad(loss, [weight])
        weight.requires_grad_(False)
        found, details = solve_from_rows(base, base_geometry(base), gradient, torch.finfo(gradient.dtype).eps, batch=2)
        both = found.expand(2, -1, -1, -1)
        psnr = psnr_db(both, images[assign(both, images)])
        mean = psnr_db(images.mean(0, keepdim=True).expand(2, -1, -1, -1), images)
        row = _row(f"batch of 2, d {width}, 16 patches of 48", "attention_rowspace", psnr, 0.0, details)
        rows.append({**row, "mean_of_the_two_db": float(mean.mean())})
    return rows


def _row(case: str, route: str, psnr: Tensor, seconds: float, details: dict[str, float]) -> dict[str, Any]:
    row = {"case": case, "route": route, "psnr_db": float(psnr.mean()), "psnr_min_db": float(psnr.min())}
    return {**row, "expected_psnr_db": details["expected_psnr_db"], "seconds": seconds}


def main() -> None:
    parser = json_parser(__doc__)
    options = parser.parse_args()
    rows = []
    for part in (embedded, adapters, batch_of_two, large_shapes):
        for row in part():
            rows.append(row)
            figures = f"refused: {row.get('why')}"
            if row["psnr_db"] is not None:
                figures = f"{row['psnr_db']:6.1f} dB (expected {row['expected_psnr_db']:5.1f}), {row['seconds']:.2f} s"
            print(f"{row['case']:42} {row['route']:18} {figures}", flush=True)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
