"""What a generative prior adds to matching of decoded gradients and of LoRA updates, and what it makes alone.

    python benchmarks/inversion/prior.py --json benchmarks/results/0.1.0/prior.json [--prior FOLDER]

16 real one-step PEFT adapters on Fashion-MNIST test images; the shipped proxy for pairs and for the prior. Without
--prior a diffusion model is trained first, as examples/train_prior.py does: about 5 minutes on 2 cores, 5 more follow.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import psnr_db, score, ssim
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.decoders import Ridge, stack_updates
from r2f_ext.inversion.label_by_label import invert_by_label
from r2f_ext.inversion.prior import ScoreDistillation
from r2f_ext.inversion.prior_training import train_prior
from r2f_ext.inversion.route import Problem
from r2f_ext.inversion.routes.amortised_refined import AmortisedRefined
from r2f_ext.inversion.routes.matching import Matching
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.progress import no_progress

VICTIMS, PAIRS, TRAINING_STEPS = 16, 3000, 1500
WEIGHTS = (0.0, 1e-5, 1e-4, 1e-3)  # the gradient of the matching loss is about 1e-4 per pixel
ALONE_STEPS = 120


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--prior", metavar="FOLDER", help="a local diffusers folder")
    options = parser.parse_args()
    private = load_images("embedded", role="private", count=VICTIMS)
    proxy = drop_private(load_images("embedded"), private)
    priors = make_priors(options.prior, proxy)
    base, adapters = load_base(), []
    with tempfile.TemporaryDirectory() as folder:
        for path in train_victims(base, private.batch(slice(None)), private.labels, Path(folder), VictimConfig()):
            target, adapter = attach(read_adapter(path), base)
            adapters.append(adapter)
    a, observed = {name: a.float() for name, a in adapters[0].a.items()}, stack_updates(adapters)
    amortised = invert_by_label(target, a, proxy, observed).reconstruction
    decoder = Ridge()
    decoder.fit(GeneratedPairs(target, a, proxy), PAIRS)
    decoded = decoder.decode(observed)

    config, rows = AuditConfig(), [line("amortised", None, amortised.images, private, amortised.seconds)]
    problem = Problem(
        base,
        target,
        observed=observed,
        a=a,
        decoded=decoded,
        found={"amortised": amortised},
        matching=config.matching,
        refinement=config.refinement,
    )
    routes = {
        "matching of decoded gradients, from gray": Matching(),
        "matching of updates, from amortised": AmortisedRefined(),
    }
    for weight, prior in zip(WEIGHTS, priors, strict=True):
        posed = replace(problem, prior=prior.gradient if weight else None)
        for name, route in routes.items():
            found = route.run(posed, no_progress)
            rows.append(line(name, weight, found.images, private, found.seconds))
    for start, images in (("gray", torch.full_like(amortised.images, 0.5)), ("amortised", amortised.images)):
        began = time.perf_counter()
        found_images = alone(priors[-1], images, config.matching.step_size if start == "gray" else 0.005)
        rows.append(line(f"prior alone, from {start}", WEIGHTS[-1], found_images, private, time.perf_counter() - began))
    if options.json:
        write_json(options.json, rows)


def make_priors(folder: str | None, proxy: ImageSet) -> list[ScoreDistillation]:
    """One a weight: read from `folder`, or trained now."""
    if folder is not None:
        return [ScoreDistillation.from_folder(folder, weight) for weight in WEIGHTS]
    unet, scheduler, _ = train_prior(proxy, TRAINING_STEPS)
    return [ScoreDistillation(unet, scheduler, weight) for weight in WEIGHTS]


def alone(prior: ScoreDistillation, start: torch.Tensor, step_size: float) -> torch.Tensor:
    """The control: descent along the prior's gradient alone, without an adapter."""
    images = start.clone()
    optimizer = torch.optim.Adam([images], lr=step_size)
    for step in range(ALONE_STEPS):
        images.grad = prior.gradient(images, step)
        optimizer.step()
        images.clamp_(0, 1)
    return images


def line(method: str, weight: float | None, images: torch.Tensor, private: ImageSet, seconds: float) -> dict[str, Any]:
    originals = private.batch(slice(None))
    figures = score(psnr_db(images, originals), ssim(images, originals))
    said = "" if weight is None else f", prior {weight:g}"
    print(
        f"{method}{said}: {figures['psnr_db_mean']:.2f} dB, SSIM {figures['ssim_mean']:.3f}; {seconds:.0f} s",
        flush=True,
    )
    return {"method": method, "prior_weight": weight, "images": len(private), **figures, "seconds": seconds}


if __name__ == "__main__":
    main()
