"""Amortised inversion of real one-step PEFT adapters (r = 8): 100 Fashion-MNIST test images and 100 faces (LFW).

    python benchmarks/inversion/amortised.py --json benchmarks/results/0.1.0/amortised.json

Every proxy serves both sets in one pass. The methods:

    all labels   one kernel ridge for all pairs
    own label    one kernel ridge per label, fitted to the pairs of that label
    U-Net        a network that is trained on the errors of `own label`
    by label     like `own label`, with the full proxy, whose pairs are made label by label
    refined      matching of the LoRA update, started at the estimates of `by label`

On 2 cores --only kernels takes about 3 minutes, --only unet 8, and --only full 30 and 4 GB. Rows of parts that are not
run are kept from the file.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.controls import make_controls
from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.config import AuditConfig
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.decoders import stack_updates
from r2f_ext.inversion import amortised
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.label_by_label import invert_by_label
from r2f_ext.inversion.route import Problem
from r2f_ext.inversion.routes.amortised_refined import AmortisedRefined
from r2f_ext.inversion.unet import UNetInverter
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.progress import no_progress
from r2f_ext.types import Reconstruction, Target

SMALL = 8000  # pairs of the rows that compare kernels: what an audit makes by default
PARTS: dict[str, tuple[tuple[str, int | None], ...]] = {  # proxies and their images; procedural ones serve every label
    "kernels": (("fashion-mnist", SMALL), ("procedural", SMALL)),
    "unet": (("fashion-mnist", SMALL), ("procedural", SMALL)),
    "full": (("procedural", 10000), ("fashion-mnist", None)),
}
Updates = dict[str, Tensor]


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    sets = {"fashion_mnist": load_images("embedded", role="private"), "lfw": load_images("lfw", role="private")}
    target, a, observed = victims(sets)
    rows = earlier(options.json, options.only)
    for part in PARTS if options.only is None else (options.only,):
        for name, count in PARTS[part]:
            proxy = proxy_for(name, count, sets)
            measure = full_size if part == "full" else compare_kernels if part == "kernels" else refine_by_net
            rows += [{"part": part, **row} for row in measure(target, a, proxy, observed, sets)]
            if options.json:
                write_json(options.json, rows)


def earlier(path: str | None, only: str | None) -> list[dict[str, Any]]:
    """The rows of the parts that are not run now."""
    if path is None or only is None or not Path(path).exists():
        return []
    return [row for row in json.loads(Path(path).read_text()) if row["part"] != only]


def victims(sets: dict[str, ImageSet]) -> tuple[Target, Updates, Updates]:
    """One PEFT adapter an image of all sets, saved and read back: target, their common A, and the updates."""
    base, adapters = load_base(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, images in sets.items():
            pixels = images.batch(slice(None))
            for path in train_victims(base, pixels, images.labels, Path(folder) / name, VictimConfig()):
                target, adapter = attach(read_adapter(path), base)
                adapters.append(adapter)
    a = {name: a.float() for name, a in adapters[0].a.items()}
    return target, a, stack_updates(adapters)


def proxy_for(name: str, count: int | None, sets: dict[str, ImageSet]) -> ImageSet:
    proxy = load_images(name, count=count)
    for private in sets.values():
        proxy = drop_private(proxy, private)
    return proxy


def compare_kernels(
    target: Target, a: Updates, proxy: ImageSet, observed: Updates, sets: dict[str, ImageSet]
) -> list[dict[str, Any]]:
    """All labels together against each label alone, from the same pairs."""
    inverter, making = inverter_on(target, a, proxy)
    rows, own_pairs = [], amortised.OWN_PAIRS
    for method, least in (("own label", own_pairs), ("all labels", len(proxy) + 1)):
        amortised.OWN_PAIRS = least
        found = inverter.invert(observed)
        far = inverter.far_from_proxy(observed)
        rows += lines(method, proxy, len(proxy), found, far, making + found.seconds, sets)
    amortised.OWN_PAIRS = own_pairs
    return rows


def refine_by_net(
    target: Target, a: Updates, proxy: ImageSet, observed: Updates, sets: dict[str, ImageSet]
) -> list[dict[str, Any]]:
    inverter, making = inverter_on(target, a, proxy)
    began = time.perf_counter()
    found = UNetInverter(inverter).invert(observed)
    seconds = making + time.perf_counter() - began
    return lines("U-Net", proxy, len(proxy), found, inverter.far_from_proxy(observed), seconds, sets)


def inverter_on(target: Target, a: Updates, proxy: ImageSet) -> tuple[AmortisedInverter, float]:
    """An inverter on pairs of the whole proxy, and the seconds it took to make pairs and inverter."""
    began = time.perf_counter()
    parts: dict[str, list[Tensor]] = {name: [] for name in target.names}
    for batch in GeneratedPairs(target, a, proxy).batches():
        for name, update in batch.updates.items():
            parts[name].append(update.flatten(1))
    updates = {name: torch.cat(parts.pop(name)) for name in target.names}
    inverter = AmortisedInverter(updates, proxy.batch(slice(None)), proxy.labels, target.base.num_classes)
    return inverter, time.perf_counter() - began


def full_size(
    target: Target, a: Updates, proxy: ImageSet, observed: Updates, sets: dict[str, ImageSet]
) -> list[dict[str, Any]]:
    made: list[int] = []
    found = invert_by_label(target, a, proxy, observed, lambda units, line="": made.append(units))
    far, start = found.far_from_proxy, found.reconstruction
    rows = lines("by label", proxy, sum(made), start, far, start.seconds, sets)
    refinement = AuditConfig().refinement
    problem = Problem(target.base, target, a=a, observed=observed, refinement=refinement, found={"amortised": start})
    refined = replace(AmortisedRefined().run(problem, no_progress), details=start.details)
    return rows + lines("refined", proxy, sum(made), refined, far, start.seconds + refined.seconds, sets)


def lines(
    method: str,
    proxy: ImageSet,
    pairs: int,
    found: Reconstruction,
    far: Tensor,
    seconds: float,
    sets: dict[str, ImageSet],
) -> list[dict[str, Any]]:
    """One row a set, beside its controls."""
    rows, first = [], 0
    for name, private in sets.items():
        part = slice(first, first + len(private))
        first += len(private)
        images, originals = found.images[part], private.batch(slice(None))
        controls = make_controls(proxy, private.labels, images, images.roll(1, 0)).items()
        psnr = psnr_db(images, originals)
        row = {
            "set": name,
            "proxy": proxy.name,
            "method": method,
            "images": len(private),
            "pairs": pairs,
            "psnr_db_mean": float(psnr.mean()),
            "psnr_db_std": float(psnr.std(correction=0)),
            "psnr_db_median": float(psnr.quantile(0.5)),
            "psnr_db_worst": float(psnr.min()),
            "controls_psnr_db_mean": {kind: float(psnr_db(each, originals).mean()) for kind, each in controls.items()},
            "labels_right": float((found.labels[part] == private.labels).float().mean()),
            "far_from_proxy": float(far[part].float().mean()),
            "held_out_psnr_db": found.details["held_out_psnr_db"],
            "seconds": seconds,
        }
        rows.append(row)
        beside = ", ".join(f"{kind} {value:.1f}" for kind, value in row["controls_psnr_db_mean"].items())
        print(
            f"{name:13} {proxy.name:13} {method:10} {pairs:6d} pairs: {row['psnr_db_mean']:.2f} dB "
            f"(median {row['psnr_db_median']:.2f}, worst {row['psnr_db_worst']:.1f}; {beside}); labels right "
            f"{row['labels_right']:.0%}, far from the proxy {row['far_from_proxy']:.0%}; {seconds:.0f} s",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
