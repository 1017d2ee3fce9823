"""All decoders on the same pairs: held-out cosine and norm, seconds to fit and to decode, beside controls.

    python benchmarks/decoders/compare_decoders.py --json benchmarks/results/0.1.0/decoders.json

Fashion-MNIST as proxy, the embedded model, one adapter's A (r = 8; qkv, proj, fc1, fc2 of four blocks). Every row is
written as soon as it is measured; rows that are in the file already are not measured again. `fit_s` includes the pass
that makes the pairs, `walk_s` is the time of that pass alone. Decoders of rows that end in _any_a are fitted on pairs
with a different A each and decode updates of an A that they have not seen; the difference from the same kind without
_any_a is the cost of not fitting to the adapter. Memory, by counting tensors: 6.5 GB at 20,000 pairs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.victims import VictimConfig, train_victim
from r2f_ext.data import load_images
from r2f_ext.decoders import KINDS, MLP, AgnosticPairs, Decoder, HeldOut, KernelRidge, Ridge, Updates, held_out_cosines
from r2f_ext.decoders.agnostic import SIZE
from r2f_ext.decoders.core import Core
from r2f_ext.decoders.learned import Learned
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.pairs import GeneratedPairs, updates_of
from r2f_ext.pairs.generate import PRECISIONS
from r2f_ext.types import Gradient

VARIANTS: dict[str, Callable[[], Decoder]] = {
    **KINDS,
    "mlp_cosine": lambda: MLP(loss="cosine"),
    "mlp_mse": lambda: MLP(loss="mse"),
    "mlp_ba": lambda: MLP(inputs="ba"),
}
ANY_A: dict[str, Callable[[], Decoder]] = {"ridge_any_a": Ridge, "kernel_ridge_any_a": KernelRidge, "mlp_any_a": MLP}
CONTROLS = ("mean_gradient", "class_mean_gradient")
ROWS = (*CONTROLS, *VARIANTS, *ANY_A)
DEFAULT_ROWS = (*CONTROLS, *KINDS, *ANY_A)


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=20_000, help="fitted pairs (default 20000)")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--proxy", default="fashion-mnist")
    parser.add_argument("--rows", nargs="+", default=DEFAULT_ROWS, choices=ROWS)
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of kinds that learn by descent")
    options = parser.parse_args()
    Decoder.precision = PRECISIONS[options.precision]
    pairs = make_pairs(options.proxy, options.pairs + options.held_out)
    if len(pairs) < options.pairs + options.held_out:
        parser.error(f"{options.proxy} has {len(pairs)} images")
    updates = updates_of(pairs, options.pairs)
    path = None if options.json is None else Path(options.json)
    rows = json.loads(path.read_text()) if path is not None and path.exists() else []
    for name in options.rows:
        key = {"row": name, "proxy": options.proxy, "pairs": options.pairs, "held_out": options.held_out}
        if learns(name):
            key["precision"] = options.precision
        if any(key.items() <= {"precision": "float32", **row}.items() for row in rows):
            continue
        row = {**key, "threads": torch.get_num_threads(), **measure(name, pairs, options.pairs, updates)}
        rows.append(row)
        print(
            f"{name:20} cosine {row['cosine_mean']:.4f}, worst layer {row['cosine_worst_layer']:.4f}, worst 5% "
            f"{row['cosine_worst_p05']:.3f}, norm error {row['norm_error_worst']:.3f}, fit {row['fit_s']:.0f} s, "
            f"decode {row['decode_s']:.0f} s",
            flush=True,
        )
        if path is not None:
            write_json(path, rows)


def learns(name: str) -> bool:
    """Whether the row is of a kind that learns by gradient descent."""
    return name not in CONTROLS and isinstance((ANY_A | VARIANTS)[name](), Learned)


def make_pairs(proxy: str, count: int) -> GeneratedPairs:
    base = load_base()
    images = load_images(proxy, count=count)
    with tempfile.TemporaryDirectory() as folder:
        victim = train_victim(base, images.batch(slice(0, 1))[0], 0, Path(folder), VictimConfig())
        target, adapter = attach(read_adapter(victim), base)
    return GeneratedPairs(target, adapter.a, images)


def measure(name: str, pairs: GeneratedPairs, count: int, updates: Updates) -> dict[str, Any]:
    began = time.perf_counter()
    if name in CONTROLS:
        held_out = control(pairs, count, by_class=name == "class_mean_gradient")
        return {**figures(held_out), "fit_s": time.perf_counter() - began, "decode_s": 0.0}
    source, asked = pairs, updates
    if name in ANY_A:
        source = many_a(pairs, count)
        asked = source.view(updates, pairs.a)
    decoder = (ANY_A | VARIANTS)[name]()
    decoder.fit(source, count)
    fitted = time.perf_counter()
    decoded = decoder.decode(asked)
    done = time.perf_counter()
    found = figures(held_out_cosines(decoded, pairs, count, len(pairs)))
    settings = getattr(decoder, "settings", None)
    walk = 0.0 if name == "projection" else time_walk(pairs, count)
    more = {} if settings is None else {"own_and_ridge": settings}
    return {**found, "fit_s": fitted - began, "decode_s": done - fitted, "walk_s": walk, **more}


def many_a(pairs: GeneratedPairs, count: int) -> AgnosticPairs:
    """Pairs with the same gradients, in which every update has its own A."""
    own = GeneratedPairs(pairs.target, pairs.a, pairs.proxy, per_victim_a=1)
    return AgnosticPairs(own, Core.of(own, count, SIZE))


def time_walk(pairs: GeneratedPairs, count: int) -> float:
    """Seconds to make the pairs once, from a tenth of them."""
    began = time.perf_counter()
    for _ in pairs.batches(0, count // 10):
        pass
    return 10 * (time.perf_counter() - began)


def control(pairs: GeneratedPairs, count: int, by_class: bool) -> HeldOut:
    """A control: the mean over pairs of gradient / norm of the update, over all pairs or those of the (true) class."""
    sums: dict[str, torch.Tensor] = {}
    groups = pairs.target.base.num_classes if by_class else 1
    number = torch.zeros(groups)
    for batch in pairs.batches(0, count):
        group = torch.nn.functional.one_hot(batch.labels[:, 0] % groups, groups).float()
        number += group.sum(0)
        for layer in pairs.target.layers:
            norms = batch.updates[layer.name].flatten(1).norm(dim=1)
            part = (group / norms[:, None]).mT @ batch.gradients.dense(layer.name).flatten(1)
            sums[layer.name] = sums[layer.name] + part if layer.name in sums else part
    cosine: dict[str, list[torch.Tensor]] = {name: [] for name in pairs.target.names}
    norm: dict[str, list[torch.Tensor]] = {name: [] for name in pairs.target.names}
    for first in range(count, len(pairs), 100):
        (batch,) = pairs.batches(first, first + 100)
        label = batch.labels[:, 0] % groups
        guess = {
            layer.name: (sums[layer.name] / number[:, None])[label].unflatten(1, (layer.d_out, layer.d_in))
            * batch.updates[layer.name].flatten(1).norm(dim=1)[:, None, None]
            for layer in pairs.target.layers
        }
        found = held_out_cosines(Gradient(guess), pairs, first, first + len(label))
        for name in pairs.target.names:
            cosine[name].append(found.cosine[name])
            norm[name].append(found.norm[name])
    return HeldOut({n: torch.cat(c) for n, c in cosine.items()}, {n: torch.cat(c) for n, c in norm.items()})


def figures(held_out: HeldOut) -> dict[str, Any]:
    layers = held_out.summary()
    means = [layer.cosine_mean for layer in layers.values()]
    return {
        "cosine_mean": sum(means) / len(means),
        "cosine_worst_layer": min(means),
        "cosine_worst_p05": min(layer.cosine_p05 for layer in layers.values()),
        "norm_error_worst": max(layer.norm_error for layer in layers.values()),
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }


if __name__ == "__main__":
    main()
