"""Which updates the ridge decoder's kernel should read: held-out cosine on both shipped proxies.

    python benchmarks/decoders/ridge_ablation.py --json benchmarks/results/0.1.0/ridge_ablation.json

`own` is the weight of a layer's own update. With own = 1 the kernel reads no other update; with own = 0 it reads the
updates of the block and those of all layers with equal weights; None, the default, chooses `own` layer by layer.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.victims import VictimConfig, train_victim
from r2f_ext.data import load_images
from r2f_ext.decoders import Ridge, held_out_cosines
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs, updates_of

CASES = [(1.0, 2000), (0.9, 2000), (0.5, 2000), (0.0, 2000), (None, 2000)]
HELD_OUT = 100


def main() -> None:
    parser = json_parser(__doc__)
    options = parser.parse_args()
    base = load_base()
    rows = []
    for name in ("embedded", "procedural"):
        proxy = load_images(name, count=max(count for _, count in CASES) + HELD_OUT)
        with tempfile.TemporaryDirectory() as folder:
            victim = train_victim(base, proxy.batch(slice(0, 1))[0], 0, Path(folder), VictimConfig())
            target, adapter = attach(read_adapter(victim), base)
        pairs = GeneratedPairs(target, adapter.a, proxy)
        updates = updates_of(pairs, len(pairs) - HELD_OUT)
        for own, count in CASES:
            decoder = Ridge(own=own)
            decoder.fit(pairs, count)
            figures = held_out_cosines(decoder.decode(updates), pairs, len(pairs) - HELD_OUT, len(pairs)).summary()
            means = [layer.cosine_mean for layer in figures.values()]
            row = {
                "proxy": name,
                "own": own,
                "pairs": count,
                "cosine_mean": sum(means) / len(means),
                "cosine_worst_layer": min(means),
                "cosine_worst_p05": min(layer.cosine_p05 for layer in figures.values()),
                "layers": {name: asdict(layer) for name, layer in figures.items()},
            }
            rows.append(row)
            print(
                f"{name:12} own {own} pairs {count:5d}: mean {row['cosine_mean']:.4f}, "
                f"worst layer {row['cosine_worst_layer']:.4f}, worst 5% {row['cosine_worst_p05']:.3f}",
                flush=True,
            )
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
