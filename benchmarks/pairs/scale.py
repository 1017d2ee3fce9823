"""Many pairs as a stream: pairs a second against the bare model, and peak memory at several counts.

    python benchmarks/pairs/scale.py [--counts 5000 50000] [--device cuda] [--json FILE]

Pairs of the embedded model, all its linear layers, r = 8, one step of SGD on one procedural image each; images are made
while the stream runs. Each count runs in a process of its own, so that its peak memory is its own. The bare model
(forward and backward to images that are at hand) is timed in the same process, before the stream and after it.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import device_parser, interleaved_medians, row, sentence, write_json
from targets import all_linear, bare_model, initial_a

from r2f_ext.data import ProceduralStream
from r2f_ext.models import load_base
from r2f_ext.pairs import GeneratedPairs

BATCH = 100


def stream(count: int, device: str) -> dict[str, float]:
    """Make `count` pairs: seconds, peak memory of this process in MB, milliseconds per pair of the bare model."""
    base = load_base(device=device)
    target = all_linear(base)
    pairs = GeneratedPairs(target, initial_a(target), ProceduralStream(count, base.input_shape, base.num_classes))
    images = torch.rand(BATCH, *base.input_shape, device=device)
    bare = {"bare": bare_model(base, images, torch.zeros(BATCH, dtype=torch.int64, device=device), BATCH)}
    before = interleaved_medians(bare, 5, device)["bare"]
    began, made = time.perf_counter(), 0
    for batch in pairs.batches():
        made += len(batch.labels)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    assert made == count
    after = interleaved_medians(bare, 5, device)["bare"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": seconds, "peak_rss_mb": peak, "bare_ms": (before + after) / 2 / BATCH}


def main() -> None:
    parser = device_parser(__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=[500, 1000, 2000], help="pairs, one run each")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for count in asked.counts:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(stream, count, asked.device).result()
        medians = {"ours": 1e3 * found["seconds"] / count, "bare model": found["bare_ms"]}
        line = row("stream of pairs", [count, 3, 32, 32], torch.float32, medians, asked.device)
        extra = {"pairs": count, "seconds": found["seconds"], "pairs_per_second": count / found["seconds"]}
        rows.append({**line, **extra, "peak_rss_mb": found["peak_rss_mb"]})
        print(sentence(line))
        print(f"{count:,} pairs in {found['seconds']:.1f} s, {count / found['seconds']:.0f} a second, ", end="")
        print(f"peak memory {found['peak_rss_mb']:.0f} MB", flush=True)
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
