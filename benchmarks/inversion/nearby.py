"""How much closer a start is whose pairs are made of images near a first estimate (`invert_nearby`).

    python benchmarks/inversion/nearby.py --proxy embedded --json FILE
    python benchmarks/inversion/nearby.py --private lfw --first 0 --victims 100 --proxy procedural --json FILE

Victims take one plain step (r = 8); the labels are found from their updates. One row a victim is added
to the file, in place of all of the same two sets.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gauss_newton_variants import CASES, embedded, initial_a, target_of
from measure import json_parser, write_json

from r2f_ext.audit.metrics import mean_interval, psnr_db
from r2f_ext.data import drop_private, load_images
from r2f_ext.inversion.label_by_label import invert_by_label, invert_nearby
from r2f_ext.inversion.near_images import generated_nearby
from r2f_ext.pairs import simulate


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--private", default="fashion-mnist")
    parser.add_argument("--first", type=int, default=1000, help="number of the first victim")
    parser.add_argument("--victims", type=int, default=40)
    parser.add_argument("--proxy", default="fashion-mnist")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    base = embedded(options.device)
    numbers = torch.arange(options.first, options.first + options.victims)
    private = load_images(options.private, role="private", count=int(numbers[-1]) + 1)
    if len(private) <= int(numbers[-1]):
        parser.error(f"'{options.private}' has only {len(private)} images: see --first and --victims")
    private = private.take(numbers)
    public = drop_private(load_images(options.proxy), private)
    generated = generated_nearby(base, options.proxy)
    case, images = CASES["default"], private.batch(slice(None), base.device)
    target = target_of(base, case)
    a = initial_a(target)
    victims = simulate(target, a, images[:, None], private.labels[:, None].to(base.device), case.training)
    observed = {name: -b for name, b in victims.b.items()}
    began = time.perf_counter()
    first = invert_by_label(target, a, public, observed).reconstruction
    between = time.perf_counter()
    second = invert_nearby(target, a, public, observed, first, generated, private.images)
    seconds = between - began, time.perf_counter() - between
    starts = psnr_db(first.images, images), psnr_db(second.images, images)
    for name, psnr, taken in zip(("first estimate", "from nearest images"), starts, seconds, strict=True):
        print(f"{options.private} from {options.proxy}, {name}: {told(psnr)} dB, {taken:.0f} s")
    print(f"gain: {told(starts[1] - starts[0])} dB; {second.details['near_pairs']:.0f} pairs")
    if options.json:
        path = Path(options.json)
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in rows if (row["private"], row["proxy"]) != (options.private, options.proxy)]
        for number, before, after in zip(numbers.tolist(), *(each.tolist() for each in starts), strict=True):
            known = {"private": options.private, "proxy": options.proxy, "victim": number}
            rows.append({**known, "first_psnr_db": before, "near_psnr_db": after})
        write_json(path, {"rows": rows})


def told(values: Tensor) -> str:
    interval = mean_interval(values.tolist(), seed=0)
    return f"{values.mean():.2f}" + ("" if interval is None else " (95 % interval {:.2f} to {:.2f})".format(*interval))


if __name__ == "__main__":
    main()
