"""Which changes make passes of the bare model faster: fused attention, samples per pass, weights in bfloat16.

    python benchmarks/pairs/model_ablation.py [--device cuda] [--json FILE]

Forward and backward to the inputs of the embedded model, nothing captured. `ours` is the pass of pair generation on a
CPU, and on a GPU but for its size: 100 samples, bfloat16 by autocast, attention fused in bfloat16 on a GPU only. Each
rival changes one thing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measure import device_parser, interleaved_medians, row, sentence, write_json

from r2f_ext.capture.hooks import fused_attention
from r2f_ext.data import load_images
from r2f_ext.models import load_base
from r2f_ext.onednn import linear_layers

SAMPLES = 200


def main() -> None:
    asked = device_parser(__doc__).parse_args()
    base = load_base(device=asked.device)
    proxy = load_images("embedded", count=SAMPLES)
    inputs, labels = base.normalize(proxy.batch(slice(None)).to(asked.device)), proxy.labels.to(asked.device)
    held = copy.deepcopy(base.model).bfloat16()

    def passes(
        model: nn.Module, size: int = 100, other: bool = False, autocast: bool = False, dtype: torch.dtype | None = None
    ) -> Callable[[], None]:
        """`other`: fuse attention where pair generation does not, and the other way round."""
        usual = asked.device == "cuda" and (autocast or dtype == torch.bfloat16)

        @fused_attention(model, usual != other)
        @linear_layers(not autocast and dtype is None)
        def run() -> None:
            for first in range(0, SAMPLES, size):
                x = inputs[first : first + size].to(dtype or torch.float32, copy=True).requires_grad_()
                with torch.autocast(asked.device, torch.bfloat16, enabled=autocast):
                    logits = model(x)
                torch.autograd.grad(F.cross_entropy(logits.float(), labels[first : first + size], reduction="sum"), x)

        return run

    model, low = base.model, torch.bfloat16
    studies: dict[torch.dtype, dict[str, Callable[[], None]]] = {
        torch.float32: {
            "ours": passes(model),
            "fused or not, the other": passes(model, other=True),
            **{f"{size} samples": passes(model, size) for size in (25, 50, 200)},
        },
        low: {
            "ours": passes(model, autocast=True),
            "fused or not, the other": passes(model, other=True, autocast=True),
            "held in bfloat16": passes(held, dtype=low),
        },
    }
    rows = []
    for dtype, functions in studies.items():
        medians = interleaved_medians(functions, 7, asked.device)
        for rival in functions:
            if rival != "ours":
                pair = {"ours": medians["ours"] / SAMPLES, rival: medians[rival] / SAMPLES}
                rows.append(row("model passes", [1, *base.input_shape], dtype, pair, asked.device))
                print(sentence(rows[-1]), flush=True)
    if asked.json:
        write_json(asked.json, rows)


if __name__ == "__main__":
    main()
