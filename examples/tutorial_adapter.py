"""Make a small copy of what PEFT's image classification tutorial makes: a transformers ViT and a LoRA adapter of it.

As in the tutorial: a ViT without a classifier, r = 16, alpha = 16, the query and value layers, dropout 0.1, a fresh
classifier saved with the adapter, 128 images a step, 5 epochs of AdamW, saved in float16. Here the ViT is small and
random and the images are procedural, so that it takes seconds and needs no download:

    python examples/tutorial_adapter.py --out tutorial
    r2f audit tutorial/adapter --base tutorial/base --out report
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from r2f_ext import load_images
from r2f_ext.data import ImageSet

CLASSES, SIDE, BATCH, EPOCHS = 10, 32, 128, 5


def save_base(folder: Path, width: int, depth: int) -> None:
    """A random ViT without a classifier, with its image processor."""
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=SIDE,
        patch_size=4,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def train(base: Path, images: ImageSet, epochs: int, batch: int) -> torch.nn.Module:
    """The tutorial's training; images become inputs in [-1, 1], as its image processor makes them."""
    model = ViTForImageClassification.from_pretrained(base, num_labels=CLASSES)
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],  # "query" and "value" before transformers 5
        lora_dropout=0.1,
        bias="none",
        modules_to_save=["classifier"],
    )
    peft = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            peft(pixel_values=2 * images.batch(rows) - 1, labels=images.labels[rows]).loss.backward()
            optimizer.step()
    return peft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tutorial"), help="folder for base/ and adapter/")
    parser.add_argument("--images", type=int, default=640, help="training images")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch", type=int, default=BATCH, help="images of one step")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    save_base(options.out / "base", options.width, options.depth)
    images = load_images(
        "procedural", input_shape=(3, SIDE, SIDE), num_classes=CLASSES, count=options.images, role="private"
    )
    model = train(options.out / "base", images, options.epochs, options.batch)
    model.half().save_pretrained(options.out / "adapter")
    steps = options.epochs * -(-options.images // options.batch)
    print(f"{options.out / 'adapter'}: {steps} steps of {options.batch} images; base: {options.out / 'base'}")


if __name__ == "__main__":
    main()
