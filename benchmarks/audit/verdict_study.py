"""How often an audit says "gave away": 200 adapters of pure noise, 100 of clothes and 100 of faces, one by one.

    python benchmarks/audit/verdict_study.py --pairs 4000 --json benchmarks/results/0.1.0/verdict_study.json

Every adapter is judged as `r2f audit ADAPTER --private DATA:INDEX` judges it: one adapter, one private image, the
default victim (r = 8, alpha = 16, one step of SGD on one image). The pairs and the kernel ridge of one audit serve all
adapters with one proxy, and so do its simulated controls, because the amortised route reads only the directions of an
update. A noise adapter has Gaussian B with the norms of a true victim's, and is scored against that victim's image.

`leaks` counts the verdicts "gave away"; `not_judged` counts adapters that lie far from every proxy update;
`leaks_near_or_far` counts the leaks if that distance is ignored. The intervals are Wilson's at 95 %. Nothing is tuned:
the level is fixed at 5 %. Victims are Fashion-MNIST test images 0-99 and the 100 faces of LFW.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.controls import Simulated, make_controls, noise_updates, simulate, simulated_psnr
from r2f_ext.audit.metrics import psnr_db
from r2f_ext.audit.verdict import judge
from r2f_ext.audit.victims import VictimConfig, train_victims
from r2f_ext.data import ImageSet, drop_private, load_images
from r2f_ext.decoders import Updates
from r2f_ext.inversion.route import Problem, Proxies, adapter_problem
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs, updates_of

NOISE, NOISE_SEED, SEED = 200, 1, 0  # the audits' own controls are drawn from SEED


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=8000)
    options = parser.parse_args()
    sets = {"fashion_mnist": load_images("embedded", role="private"), "lfw": load_images("lfw", role="private")}
    rows = []
    for name in ("procedural", "embedded"):
        proxy = load_images(name, count=options.pairs, seed=SEED)
        for private in sets.values():
            proxy = drop_private(proxy, private)
        rows += study(proxy, sets)
        if options.json:
            write_json(options.json, rows)


def study(proxy: ImageSet, sets: dict[str, ImageSet]) -> list[dict[str, Any]]:
    """The verdicts with one proxy."""
    problem = first_problem(sets["fashion_mnist"])
    target, a = problem.target, problem.a
    assert target is not None and a is not None
    device = target.base.device
    proxies = Proxies(
        {name: update.flatten(1) for name, update in updates_of(GeneratedPairs(target, a, proxy)).items()},
        proxy.batch(slice(None), device),
        proxy.labels.to(device),
        target.base.num_classes,
    )
    true = {name: updates_of(GeneratedPairs(target, a, private)) for name, private in sets.items()}
    clothes = true["fashion_mnist"]
    drawn = list(noise_updates(clothes, NOISE, NOISE_SEED))
    noise = {name: torch.cat([part[name] for part in drawn]) for name in target.names}
    problem = replace(problem, proxies=proxies, observed=clothes)
    simulated = simulate(problem, proxy, range(target.base.num_classes), SEED, "float32")
    asked = {
        "noise": (noise, sets["fashion_mnist"].take(torch.arange(NOISE) % len(sets["fashion_mnist"]))),
        "fashion_mnist": (clothes, sets["fashion_mnist"]),
        "lfw": (true["lfw"], sets["lfw"]),
    }
    return [
        {"proxy": proxy.name, "pairs": len(proxy), "adapters": name, **counts(problem, proxy, simulated, *each)}
        for name, each in asked.items()
    ]


def first_problem(private: ImageSet) -> Problem:
    """The problem of one PEFT victim, whose base, layers and A all other victims share."""
    base = load_base("embedded")
    with tempfile.TemporaryDirectory() as folder:
        (path,) = train_victims(base, private.batch([0]), private.labels[:1], Path(folder), VictimConfig())
        target, update = attach(read_adapter(path), base)
    return adapter_problem(target, [update])


def counts(
    problem: Problem, proxy: ImageSet, simulated: Simulated, observed: Updates, private: ImageSet
) -> dict[str, Any]:
    """How many of n adapters are called a leak, each judged alone."""
    assert problem.proxies is not None
    ridge = problem.proxies.ridge
    estimate, far = ridge.invert(observed).images.cpu(), ridge.far_from_proxy(observed).cpu()
    originals = private.batch(slice(None))
    labels = None if private.random_labels else private.labels
    images = make_controls(proxy, labels, estimate, estimate)
    pools = replace(simulated, labels=ridge.find_labels(observed).cpu()).pools(slice(None), labels)
    verdicts, alone = [], []
    for i in range(len(estimate)):
        row = slice(i, i + 1)
        scores = {
            "mean_image": psnr_db(images.mean_image[row], originals[row])[:, None],
            **{name: simulated_psnr(pool[row], originals[row], None) for name, pool in pools.items()},
        }
        if images.class_mean is not None:
            scores["class_mean"] = psnr_db(images.class_mean[row], originals[row])[:, None]
        score = psnr_db(estimate[row], originals[row])
        verdicts.append(judge(score, scores, far[row], SEED).leak)
        alone.append(judge(score, scores, torch.zeros(1, dtype=torch.bool), SEED).leak)
    leaks, count = sum(one is True for one in verdicts), len(verdicts)
    interval = binomtest(leaks, count).proportion_ci(method="wilson")
    return {
        "count": count,
        "leaks": leaks,
        "not_judged": sum(one is None for one in verdicts),
        "leaks_near_or_far": sum(one is True for one in alone),
        "leak_share": leaks / count,
        "leak_share_interval": [float(interval.low), float(interval.high)],
        "psnr_db_mean": float(psnr_db(estimate, originals).mean()),
    }


if __name__ == "__main__":
    main()
