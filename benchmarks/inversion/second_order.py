"""Double backward against central differences: how far the matching loss falls in one step along each gradient.

    python benchmarks/inversion/second_order.py [--json FILE]

One image's exact gradient, a random start, `layer_cosine`, no total variation. Printed for a smooth model (the
embedded ViT) and one with kinks (breaching's ConvNet: ReLU and max-pooling; needs breaching 0.1.2): the cosine of the
two gradients, and the change of the loss if every pixel moves by 0.001 or by 0.01 against the sign of the gradient.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compare_breaching import conv_base, images_of
from measure import json_parser, write_json

from r2f_ext.inversion.candidates import ParameterGradients
from r2f_ext.models import load_base
from r2f_ext.ops import matching_loss
from r2f_ext.types import BaseModel

warnings.filterwarnings("ignore")


def measure(name: str, base: BaseModel, dtype: torch.dtype) -> dict:
    base.model.to(dtype)
    images, labels = images_of(base, 1)
    labels = labels[:, None]
    candidates = ParameterGradients(base, [name for name, _ in base.model.named_parameters()])
    observed = list(candidates(images[:, None].to(dtype), labels).dense.values())

    def loss(gradients: list[Tensor]) -> Tensor:
        return matching_loss(gradients, observed, images=images.to(dtype), kind="layer_cosine").sum()

    torch.manual_seed(0)
    start = torch.rand(1, 1, *base.input_shape, dtype=dtype).requires_grad_()
    (double,) = torch.autograd.grad(loss(list(candidates(start, labels, create_graph=True).dense.values())), [start])
    start = start.detach()
    dense = candidates(start, labels).dense
    leaves = [gradient.requires_grad_() for gradient in dense.values()]
    before = loss(leaves)
    direction = dict(zip(dense, torch.autograd.grad(before, leaves), strict=True))
    central = candidates.slope_along(start, labels, direction)
    row: dict = {"model": name, "dtype": str(dtype).removeprefix("torch."), "loss": round(float(before), 4)}
    row["cosine"] = round(float(F.cosine_similarity(double.flatten(), central.flatten(), dim=0)), 4)
    for which, slope in (("double_backward", double), ("central_differences", central)):
        for size in (1e-3, 1e-2):
            moved = list(candidates(start - size * slope.sign(), labels).dense.values())
            row[f"{which} {size:g}"] = round(float(loss(moved) - before), 5)
    return row


def main() -> None:
    asked = json_parser(__doc__).parse_args()
    rows = [measure("embedded ViT", load_base("embedded"), torch.float32)]
    rows.append(measure("breaching ConvNet", conv_base(seed=0), torch.float32))
    for row in rows:
        print(json.dumps(row), flush=True)
    if asked.json:
        write_json(asked.json, {"rows": rows})


if __name__ == "__main__":
    main()
