"""Train a LoRA adapter with plain PEFT on one image, as an input for `r2f audit`.

python examples/train_adapter.py --out my-adapter --rank 4 --alpha 32 --modules attn.qkv mlp.fc1 --index 3
r2f audit my-adapter --private embedded:3 --out report
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from r2f_ext import load_base, load_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--images", default="embedded")
    parser.add_argument("--index", type=int, default=0, help="index of the private image")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--modules", nargs="+", default=["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    base = load_base(options.base)
    private = load_images(
        options.images, role="private", input_shape=base.input_shape, num_classes=base.num_classes
    ).take(torch.tensor([options.index]))
    lora = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=options.modules)
    model = get_peft_model(copy.deepcopy(base.model), lora)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[options.optimizer]
    optimizer = kind((p for p in model.parameters() if p.requires_grad), lr=options.lr)
    for _ in range(options.steps):
        optimizer.zero_grad()
        F.cross_entropy(model(base.normalize(private.batch(slice(None)))), private.labels).backward()
        optimizer.step()
    model.save_pretrained(options.out)
    print(f"adapter in {options.out}")


if __name__ == "__main__":
    main()
