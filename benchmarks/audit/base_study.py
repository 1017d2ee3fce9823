"""Whether the base check detects wrong weights, and accepts unusual images: victims of right and wrong bases.

    python benchmarks/audit/base_study.py --victims 20 --json benchmarks/results/0.1.0/base_study.json

Every adapter is judged as `r2f audit ADAPTER` judges it (`r2f_ext.audit.base_check`): the default victim (r = 8,
alpha = 16, one step of SGD on one image, all linear layers of the blocks) on the embedded base's architecture, audited
on the embedded base, with 16 procedural proxies. PEFT draws A; the updates are what that step does to B.

Right base: clothes, faces, procedural images, uniform noise, flat colours and nearly black images. Wrong base, with
victims trained on clothes and on faces: random weights of other seeds; the embedded base, trained further on clothes
(1, 10 and 100 steps of SGD at 0.01) or changed by Gaussian noise of a share of each parameter's standard deviation; and
the embedded base with another classifier only, which the check cannot detect. The `noise adapters` have Gaussian B
with the norms of true victims. `fits`, `refuted` and `open` count adapters.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.base_check import BaseCheck, check_base
from r2f_ext.audit.controls import noise_updates
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.data import ImageSet, load_images
from r2f_ext.inversion.route import Problem, Proxies, adapter_problem
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.models.embedded import build_embedded_vit, reset_head
from r2f_ext.pairs import GeneratedPairs, updates_of
from r2f_ext.types import BaseModel

PROXIES, CLASSES = 16, 10
Images = tuple[Tensor, Tensor]  # [n, 3, 32, 32] and labels [n]


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--victims", type=int, default=20)
    options = parser.parse_args()
    base, kinds = load_base("embedded"), images_of(options.victims)
    rows = [row("the same", kind, check(base, base, images)) for kind, images in kinds.items()]
    for name, other in other_bases(base):
        for kind in ("clothes", "faces"):
            rows.append(row(name, kind, check(base, other, kinds[kind])))
    rows.append(row("the same", "noise adapters", check(base, base, kinds["clothes"], noise=True)))
    if options.json:
        write_json(options.json, rows)


def images_of(count: int) -> dict[str, Images]:
    """Kind -> private images and labels."""
    generator, labels = torch.Generator().manual_seed(5), torch.arange(count) % CLASSES
    shape = (count, 3, 32, 32)
    found = {}
    for kind, name in (("clothes", "embedded"), ("faces", "lfw")):
        images = load_images(name, role="private", count=count)
        found[kind] = (images.batch(slice(None)), images.labels)
    found["procedural"] = (load_images("procedural", count=count, seed=9).batch(slice(None)), labels)
    found["uniform noise"] = (torch.rand(shape, generator=generator), labels)
    found["flat colours"] = (torch.rand(count, 3, 1, 1, generator=generator).expand(shape).contiguous(), labels)
    found["nearly black"] = ((torch.rand(shape, generator=generator) > 0.999).float(), labels)
    return found


def other_bases(base: BaseModel) -> Iterator[tuple[str, BaseModel]]:
    """(what differs, base) of the same architecture."""
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        model = build_embedded_vit().eval().requires_grad_(False)
        reset_head(model)
        yield f"random weights, seed {seed}", replace(base, model=model)
    for steps in (1, 10, 100):
        yield f"trained {steps} more steps", trained_further(base, steps)
    for share in (1e-4, 1e-2):
        model = copy.deepcopy(base.model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() > 1:
                    parameter += share * parameter.std() * torch.randn_like(parameter)
        yield f"moved by {share:g}", replace(base, model=model)
    model = copy.deepcopy(base.model)
    reset_head(model, 7)
    yield "another classifier", replace(base, model=model)


def trained_further(base: BaseModel, steps: int) -> BaseModel:
    images, model = load_images("embedded", count=640), copy.deepcopy(base.model).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        index = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(base.normalize(images.batch(index))), images.labels[index]).backward()
        optimizer.step()
    return replace(base, model=model.requires_grad_(False))


def check(base: BaseModel, trained_on: BaseModel, images: Images, noise: bool = False) -> BaseCheck:
    """Victims of `trained_on`, checked against `base`."""
    pixels, labels = images
    with tempfile.TemporaryDirectory() as folder:
        (path,) = train_victims(trained_on, pixels[:1], labels[:1], Path(folder), VictimConfig())
        target, update = attach(read_adapter(path), base)
    problem = with_proxies(adapter_problem(target, [update]))
    assert problem.a is not None
    private = ImageSet("private", (255 * pixels).round().to(torch.uint8), labels)
    observed = updates_of(GeneratedPairs(replace(target, base=trained_on), problem.a, private))
    if noise:
        parts = list(noise_updates(observed, len(labels), seed=1))
        observed = {name: torch.cat([part[name] for part in parts]) for name in target.names}
    return check_base(replace(problem, observed=observed, adapters=[update] * len(labels)))


def with_proxies(problem: Problem) -> Problem:
    assert problem.target is not None and problem.a is not None
    proxy = load_images("procedural", count=PROXIES)
    (batch,) = GeneratedPairs(problem.target, problem.a, proxy).batches()
    updates = {name: update.flatten(1) for name, update in batch.updates.items()}
    return replace(problem, proxies=Proxies(updates, proxy.batch(slice(None)), proxy.labels, CLASSES))


def row(weights: str, images: str, found: BaseCheck) -> dict[str, Any]:
    return {
        "trained_on": weights,
        "images": images,
        "count": len(found.fits),
        "fits": sum(one is True for one in found.fits),
        "refuted": sum(one is False for one in found.fits),
        "open": sum(one is None for one in found.fits),
        "residual_min": min(found.residuals),
        "residual_max": max(found.residuals),
        "proxies_max": found.at_most,
    }


if __name__ == "__main__":
    main()
