"""Train a small unconditional diffusion model on proxy images, as a prior for `r2f_ext.inversion.prior`.

    python examples/train_prior.py --out prior [--proxy fashion-mnist] [--steps 3000] [--prediction v_prediction]

Writes `unet/` and `scheduler/` as diffusers does (safetensors, about 2 MB), for gray 32x32 images. An exponential
average of the weights is saved. 3,000 steps take about 10 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from r2f_ext import load_images
from r2f_ext.files import write_atomically
from r2f_ext.inversion.prior_training import train_prior


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--proxy", default="embedded")
    parser.add_argument("--count", type=int)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--prediction", default="v_prediction", choices=("epsilon", "sample", "v_prediction"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = load_images(options.proxy, count=options.count, seed=options.seed)
    unet, scheduler, _ = train_prior(images, options.steps, options.prediction, options.seed, report)

    def write(folder: Path) -> None:
        unet.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")

    write_atomically(Path(options.out), write)


def report(steps: int, line: str = "", /) -> None:
    if line:
        print(line, flush=True)


if __name__ == "__main__":
    main()
