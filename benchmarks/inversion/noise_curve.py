"""PSNR of the row-space closed form as noise on the gradient grows, next to that of the mean image.

    python benchmarks/inversion/noise_curve.py --json benchmarks/results/0.1.0/noise_curve.json

Gaussian noise of the given size (its Frobenius norm over the gradient's) is added to the embedded model's float32
gradients (0: none). `route`: without public images. `with_public`: with 1,000 public images as a prior of the solve
(Fashion-MNIST train for Fashion-MNIST, procedural for faces); their mean image is the control. `worst_gain`: the
smallest difference between `with_public` and the mean image over all images.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import json_parser, write_json

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import load_images
from r2f_ext.inversion.attention_rowspace import invert_attention_rowspace
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.geometry import QKV_WEIGHT
from r2f_ext.models import load_base

NOISE = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SETS = (("embedded", "embedded"), ("lfw", "procedural"))


def main() -> None:
    parser = json_parser(__doc__)
    parser.add_argument("--count", type=int, default=8, help="images of each set (default 8)")
    options = parser.parse_args()
    base = load_base("embedded")
    rows = []
    for private_name, public_name in SETS:
        private = load_images(private_name, role="private", count=options.count)
        images = private.batch(slice(None))
        public = load_images(public_name, count=1000).batch(slice(None))
        mean = psnr_db(public.mean(0, keepdim=True).expand_as(images), images)
        weights = [g[QKV_WEIGHT].double() for g in exact_gradients(base, images, private.labels)]
        generator = torch.Generator().manual_seed(0)
        for relative in NOISE:
            plain, helped, expected = [], [], []
            for weight in weights:
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                noisy = {QKV_WEIGHT: weight + relative * noise * weight.norm() / noise.norm()}
                if relative == 0:
                    noisy = {QKV_WEIGHT: weight.float()}
                plain.append(invert_attention_rowspace(base, noisy).images)
                found = invert_attention_rowspace(base, noisy, public)
                helped.append(found.images)
                expected.append(found.details["expected_psnr_db"])
            route, with_public = (psnr_db(torch.cat(part), images) for part in (plain, helped))
            row = {
                "set": private_name,
                "public": public_name,
                "n": len(images),
                "relative_noise": relative,
                "route_db": float(route.mean()),
                "with_public_db": float(with_public.mean()),
                "with_public_min_db": float(with_public.min()),
                "expected_db": sum(expected) / len(expected),
                "mean_image_db": float(mean.mean()),
                "worst_gain_db": float((with_public - mean).min()),
            }
            rows.append(row)
            print(
                f"{private_name:9} noise {relative:7.0e}: {row['route_db']:6.2f} dB, with public images "
                f"{row['with_public_db']:6.2f} (expected {row['expected_db']:6.2f}), mean image "
                f"{row['mean_image_db']:5.2f}, worst gain {row['worst_gain_db']:+6.2f}",
                flush=True,
            )
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
