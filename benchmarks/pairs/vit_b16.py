"""Pairs of ViT-B/16 at 224: what one costs in time, memory and disk, and how many go through the model at once.

    python benchmarks/pairs/vit_b16.py [--count 48] [--weights FOLDER] [--device cuda] [--json FILE]

Random weights by default (time and memory do not depend on them); --weights takes a base folder as `r2f --base` does.
Procedural images, r = 8: all linear layers (qkv, proj, fc1, fc2 of 12 blocks), then qkv alone.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import device_parser, gemm_flops, interleaved_medians, machine, row, sentence, write_json
from targets import all_linear, bare_model, initial_a

from r2f_ext.data import ProceduralStream
from r2f_ext.models import load_base
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.pairs.memory import sample_bytes
from r2f_ext.types import BaseModel, Target


def random_vit_b16(device: str) -> BaseModel:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", pretrained=False).eval().requires_grad_(False).to(device)
    unfuse_attention(model)
    return BaseModel(model, "timm:vit_base_patch16_224", (3, 224, 224), (0.5,) * 3, (0.5,) * 3, 1000)


def bare_ms(base: BaseModel, samples: int, device: str) -> float:
    """Milliseconds per sample of the bare model, in passes of `samples`."""
    images = torch.rand(samples, *base.input_shape, device=device)
    labels = torch.zeros(samples, dtype=torch.int64, device=device)
    return interleaved_medians({"bare": bare_model(base, images, labels, samples)}, 5, device)["bare"] / samples


def measure(target: Target, count: int, device: str) -> dict[str, Any]:
    proxy = ProceduralStream(count, target.base.input_shape, target.base.num_classes)
    pairs, cost = GeneratedPairs(target, initial_a(target), proxy), sample_bytes(target)
    began, in_batches = time.perf_counter(), 0.0
    for batch in pairs.batches():
        in_batches += float(sum(update.square().sum() for update in batch.updates.values()))
    seconds = time.perf_counter() - began
    assert in_batches > 0
    return {
        "pairs": count,
        "batch_groups": pairs.batch_groups,
        "seconds_per_pair": seconds / count,
        "pass_mb_per_sample": cost.in_pass / 1e6,
        "factors_mb_bfloat16": cost.factors / 2e6,
        "dense_mb_bfloat16": sum(layer.d_out * layer.d_in for layer in target.layers) * 2 / 1e6,
        "updates_mb_float32": sum(layer.d_out * layer.rank for layer in target.layers) * 4 / 1e6,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--count", type=int, default=48, help="pairs of each kind (default 48)")
    parser.add_argument("--weights", metavar="FOLDER", help="a base folder instead of random weights")
    asked = parser.parse_args()
    base = random_vit_b16(asked.device) if asked.weights is None else load_base(asked.weights, asked.device)
    everything = all_linear(base)
    qkv = replace(everything, layers=tuple(layer for layer in everything.layers if layer.name.endswith("attn.qkv")))
    rows: list[dict[str, Any]] = []
    for name, target in (("ViT-B/16, qkv", qkv), ("ViT-B/16, all linear layers", everything)):
        found = measure(target, asked.count, asked.device)
        bare = bare_ms(base, found["batch_groups"], asked.device)
        medians = {"ours": 1e3 * found["seconds_per_pair"], "bare model": bare}
        line = row(name, [asked.count, *base.input_shape], torch.float32, medians, asked.device)
        rows.append({**line, **found})
        print(sentence(line))
        print({key: round(value, 3) for key, value in found.items()}, flush=True)
    print(f"this machine multiplies float32 matrices at {gemm_flops(torch.float32, asked.device) / 1e9:.0f} GFLOP/s")
    if asked.json:
        write_json(asked.json, [{"machine": machine(asked.device), "rows": rows}])


if __name__ == "__main__":
    main()
