"""A report written by hand: the data of report.json, schema 2, and the pictures that belong to it."""

import torch

from r2f_ext.audit.controls import Controls
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.sets import SetReport
from r2f_ext.types import Reconstruction

LAYERS = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
EXACT = {"exact": True, "bound_db": 78.2, "free_directions": 0, "words": "exact to 78 dB"}
FREE = {"exact": False, "bound_db": None, "free_directions": 365, "words": "determined up to 365 directions"}


def smooth(count, shape, seed):
    """[count, *shape], blurred noise in [0, 1]."""
    noise = torch.rand(count, shape[0], 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, shape[1:], mode="bicubic").clamp(0, 1)


def victims(count=1, shape=(1, 32, 32), name="my-adapter", private=True, exact=True):
    """(set, its entry in report.json)."""
    originals = smooth(count, shape, 0)
    routes = {"gauss_newton": originals + 1e-5, "amortised": 0.7 * originals + 0.3 * smooth(count, shape, 1)}
    labels = torch.arange(count) % 10
    found = [
        Reconstruction(route, images, labels, f"Why {route}.", 1.0)
        for route, images in list(routes.items())[not exact :]
    ]
    controls = None
    if private:
        images = smooth(1, shape, 2).expand(count, -1, -1, -1)
        controls = Controls(**dict.fromkeys(Controls.__dataclass_fields__, images))
    part = SetReport(
        name, "procedural", count, found, originals if private else None, labels if private else None, controls
    )
    scores = {"psnr_db_mean": 23.4, "psnr_db_std": 1.2, "psnr_db_median": 23.0, "ssim_mean": 0.81}
    unscored = dict.fromkeys(scores)
    figures = {
        "n": count,
        "proxy": "procedural",
        "routes": {
            one.route: {
                **(scores if private else unscored),
                "psnr_db": [23.4] * count if private else None,
                "ssim": [0.81] * count if private else None,
                "label_accuracy": 0.5 if private else None,
                "why": one.why,
                "details": {},
                "per_victim": {},
                "exact": [FREE if i % 3 == 2 else EXACT for i in range(count)] if one.route == "gauss_newton" else None,
            }
            for one in found
        },
        "controls": {key: 9.1 + i for i, key in enumerate(controls.items())} if controls else {},
        "control_intervals": {
            "shuffled_adapter": {"difference_db": 1.3, "interval_db": [0.4, 2.2], "p_value": 0.005, "simulated": 199},
            "mean_image": {"difference_db": 3.2, "interval_db": None, "p_value": None, "simulated": None},
        }
        if controls
        else {},
        "judged_route": "amortised",
        "pairing": "Victims and private images are paired by assignment on the reconstructions." if private else None,
        "verdict": "The adapter gave away 1.3 dB.",
        "notes": ["The update lies far from every proxy update."],
    }
    return part, figures


def report(sets, phase0=(), adapters=None):
    """The data of report.json for sets of `victims`."""
    cosines = {"cosine_mean": 0.93, "cosine_p05": 0.88, "norm_error": 0.1}
    beside = {"class_mean_cosine": 0.76, "floor_cosine": 0.3, "victim_estimate": 0.7, "victim_true": 0.65}
    decoders = {
        layer: {kind: {**cosines, **beside} for kind in ("projection", "row_lmmse", "ridge")} for layer in LAYERS
    }
    exact = [
        {"set": part.name, "victim": i, "route": route, **one}
        for part, figures in sets
        for route, values in figures["routes"].items()
        for i, one in enumerate(values["exact"] or [])
    ]
    total = sum(part.count for part, _ in sets)
    layers = [
        {"name": name, "d_out": 128, "d_in": 128, "rank": 8 + 8 * (i % 2), "scale": 2.0, "saved": False}
        for i, name in enumerate(LAYERS)
    ]
    return {
        "schema": 2,
        "date": "2026-01-02T03:04:05Z",
        "command": "r2f audit my-adapter --out report",
        "verdict": {
            "leak": True,
            "beyond_control_db": 1.3,
            "interval_db": [0.4, 2.2],
            "confidence": 0.95,
            "exact": exact,
            "threat_model": {"amortised": "Anyone who has the adapter and the public base."},
            "tried": ["amortised"],
            "not_tried": [{"route": "matching", "why": "It was not asked for."}],
            "sentences": [
                "One image is recovered exactly, to 78 dB.",
                "The adapter gives away 1.3 dB (0.4 to 2.2).",
                "This is no proof of safety.",
            ],
        },
        "versions": {"r2f_ext": "0.0", "torch": "2.9"},
        "backend": {"gram": "cpu"},
        "target": {
            "base": "embedded",
            "rank": 16,
            "layers": layers,
            "tokens": 65,
            "identifiable": {"gauss_newton": True, "patch_position": False},
            "why": {
                "gauss_newton": "12,288 equations for 1,024 unknowns.",
                "patch_position": "No gradient is observed.",
            },
        },
        "phase0": [one.to_json() for one in phase0],
        "decoders": decoders,
        "reconstruction": {part.name: figures for part, figures in sets},
        "pairs": {"count": 3000, "per_second": 1234.5},
        "seconds": {"pairs": 10.0, "total": 61.5},
        "proxies": {"procedural": {"decoders": decoders, "pairs": {"count": 3000, "per_second": 1234.5}}},
        "config": {"pairs": 3000, "routes": None, "gauss_newton": True, "precision": "float32", "seed": 0},
        "inputs": {"adapters": ["../my-adapter"], "base": "embedded", "proxy": "procedural", "private": None},
        "notes": ["A sentence on the run."],
        "adapters": adapters
        or [
            {"name": f"adapter-{i}", "notes": ["Keys lost a prefix."], "leaks": ["optimizer.pt lies beside it."]}
            | {"dropout": 0.0, "init": "true"}
            for i in range(total)
        ],
        "spectra": {
            name: {"largest": 0.012, "relative": [0.7**i for i in range(8)], "directions": 6} for name in LAYERS
        },
        "device": "cpu",
        "lpips": "unavailable",
    }


def closed_forms(part):
    return [Phase0Report("patch_position", 100.0, 90.0, 0.1, "A closed form.", part.originals)]
