"""Pairs a second on a GPU, against the bare model's own forward and backward in the same batches.

    python benchmarks/pairs/on_gpu.py --json benchmarks/results/0.1.0/nvidia-h200-pair-rates.json

The embedded model, with procedural images that are made while the stream runs, with images that are in memory, and with
pairs written into shards on disk; ViT-B/16 at 224 with random weights. Three precisions (shards: float32 only); the
embedded rows have the cosine of their updates to those in float32. Medians of five passes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, machine, write_json
from targets import all_linear, bare_model, initial_a

from r2f_ext.capture.hooks import fused_attention
from r2f_ext.data import ImageSet, ProceduralStream, load_images
from r2f_ext.gpu import float32_products
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs, write_pairs
from r2f_ext.progress import no_progress
from r2f_ext.types import BaseModel

# The stream is longer than the chunks of images that it caches, so that every pass makes all of them.
STREAMED, AT_HAND, WRITTEN, VIT_IMAGES, VIT_BATCH = 196608, 8192, 5120, 1024, 256
PRECISIONS = ("float32", "tf32", "bfloat16")
WALKS = 5


def main() -> None:
    options = json_parser(__doc__, required=True).parse_args()
    record: dict[str, Any] = {"machine": machine("cuda"), "rows": []}
    for row in (*embedded(), *into_shards(), *vit_b16()):
        record["rows"].append(row)
        print(row, flush=True)
        write_json(options.json, record)


def per_second(run: Callable[[], object], count: int) -> float:
    """Items per second, the median of WALKS calls; one call before them warms up."""
    run()
    rates = []
    for _ in range(WALKS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


def walked(pairs: GeneratedPairs, count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in pairs.batches(0, count):
            pass

    return run


@contextmanager
def as_in(base: BaseModel, precision: str) -> Iterator[None]:
    """The bare model as `Capture` runs it in this precision."""
    low = precision == "bfloat16"
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=low)
    with float32_products(precision == "tf32"), autocast, fused_attention(base.model, low):
        yield


def embedded() -> Iterator[dict[str, Any]]:
    base = load_base(device="cuda")
    target = all_linear(base)
    a = initial_a(target)
    stream = ProceduralStream(STREAMED, base.input_shape, base.num_classes, device="cuda")
    proxy = load_images("procedural", count=AT_HAND)
    images, labels = proxy.batch(slice(None), "cuda"), proxy.labels.cuda()
    updates: dict[str, dict[str, torch.Tensor]] = {}
    for precision in PRECISIONS:
        pairs, streamed = (GeneratedPairs(target, a, each, precision=precision) for each in (proxy, stream))
        batch = pairs.batch_groups
        with as_in(base, precision):
            bare = per_second(bare_model(base, images, labels, batch), AT_HAND)
        torch.cuda.reset_peak_memory_stats()  # of the pairs, without the bare model
        (first,) = pairs.batches(0, 256)
        updates[precision] = first.updates
        yield {
            "model": "embedded",
            "precision": precision,
            "batch": batch,
            "bare_model": bare,
            "images_at_hand": per_second(walked(pairs, AT_HAND), AT_HAND),
            "stream": per_second(walked(streamed, STREAMED), STREAMED),
            "update_cosine": cosine(updates[precision], updates["float32"]),
            "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        }

    def images_alone() -> None:
        made = ProceduralStream(STREAMED, base.input_shape, base.num_classes, device="cuda")
        for first in range(0, STREAMED, 4096):
            made.batch(slice(first, first + 4096))

    yield {"model": "procedural images alone", "stream": per_second(images_alone, STREAMED)}


def cosine(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The lowest of the layers' mean cosines of updates."""
    return min(float(torch.cosine_similarity(found[n].flatten(1), exact[n].flatten(1)).mean()) for n in exact)


def into_shards() -> Iterator[dict[str, Any]]:
    base = load_base(device="cuda")
    target = all_linear(base)
    proxy = ProceduralStream(WRITTEN, base.input_shape, base.num_classes, device="cuda")
    pairs = GeneratedPairs(target, initial_a(target), proxy)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_pairs(pairs, WRITTEN, Path(folder) / "pairs", no_progress)
        seconds = time.perf_counter() - began
        size = sum(file.stat().st_size for file in Path(folder).rglob("*"))
        began = time.perf_counter()
        torch.zeros(1 << 30, dtype=torch.uint8).numpy().tofile(Path(folder) / "plain")
        plain = (1 << 30) / (time.perf_counter() - began)
    yield {
        "model": "embedded, into shards",
        "pairs": WRITTEN,
        "seconds": seconds,
        "GB": size / 1e9,
        "plain_write_GB_per_s": plain / 1e9,
    }


def vit_b16() -> Iterator[dict[str, Any]]:
    base = load_base("timm-random:vit_base_patch16_224", device="cuda")
    target = all_linear(base)
    a, generator = initial_a(target), torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (VIT_IMAGES, *base.input_shape), generator=generator, dtype=torch.uint8)
    proxy = ImageSet("noise", noise, torch.randint(0, base.num_classes, (VIT_IMAGES,), generator=generator))
    images, labels = proxy.batch(slice(0, 2 * VIT_BATCH), "cuda"), proxy.labels[: 2 * VIT_BATCH].cuda()
    for precision in PRECISIONS:
        with as_in(base, precision):
            bare = per_second(bare_model(base, images, labels, VIT_BATCH), 2 * VIT_BATCH)
        torch.cuda.reset_peak_memory_stats()
        pairs = GeneratedPairs(target, a, proxy, precision=precision)
        yield {
            "model": "ViT-B/16 at 224, random weights",
            "precision": precision,
            "batch": pairs.batch_groups,
            "bare_model": bare,
            "images_at_hand": per_second(walked(pairs, VIT_IMAGES), VIT_IMAGES),
            "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        }


if __name__ == "__main__":
    main()
