"""What PEFT's `init_lora_weights` does to A, B and the base, and which starts can be audited.

The sentences state what peft.tuners.lora.layer.LoraLayer does in each of its `*_init` methods.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r2f_ext.errors import R2FError, plain

CONVERT = "save it with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)"
_PISSA = (
    "PiSSA: the start of B A is the principal part of each base weight, and is taken out of the base, so the adapter "
    f"belongs to a changed base and its start is not in the file; {CONVERT}, which writes both"
)
REFUSED = {
    "pissa": _PISSA,
    "olora": (
        "OLoRA: A and B start from the QR factors of each base weight, and B A is taken out of the base, so the "
        f"adapter belongs to a changed base and its start is not in the file; {CONVERT}, which writes both"
    ),
    "corda": (
        "CorDA: A and B start from the base weights and the covariance of data that was shown to the base, and B A "
        f"is taken out of the base; A itself gives away that data's main directions; {CONVERT} to have it audited"
    ),
    "lora_ga": (
        "LoRA-GA: A and B start from the singular vectors of a gradient on training data, and B A is taken out of "
        f"the base; A itself gives away that gradient's directions; {CONVERT} to have it audited"
    ),
    "loftq": (
        "LoftQ: the base is replaced by a quantised one, and B A starts as the error of that; train with "
        "init_lora_weights=True"
    ),
    "orthogonal": (
        "B then starts from random numbers that are not in the file, so B does not show the training alone; "
        "train with init_lora_weights=True"
    ),
    "mica": (
        "MiCA: B stays at singular vectors of the base and only A is trained, while the routes read the training "
        "from B; train with init_lora_weights=True"
    ),
    "false": (
        "PEFT then draws both A and B at random, so B does not start at zero and does not show the training alone; "
        "train with init_lora_weights=True"
    ),
}
MAX_RANK = 1024  # up to which rows are compared
EVA_LEAK = (
    "init_lora_weights is 'eva': EVA makes A from the inputs that the layers see on the training data, so A itself "
    "gives away the directions that these inputs span."
)
EVA_UNSEEN = (
    "init_lora_weights is 'eva', but the rows of A are no more orthogonal than random ones: EVA's pass over the data "
    "was not run, or training has covered its start."
)
# Configurations that act only through init_lora_weights (PEFT ignores them under any other start) -> the method and
# what its start is made of.
START_CONFIGS = {
    "eva_config": ("EVA", "made from data"),
    "corda_config": ("CorDA", "made from data"),
    "lora_ga_config": ("LoRA-GA", "made from a gradient on data"),
    "loftq_config": ("LoftQ", "made from the base"),
}


def start_of(value: Any, where: str) -> str:
    """The start that `init_lora_weights` names: "true", "gaussian" or "eva".

    Args:
        value: as it stands in adapter_config.json; where: that file, for the message.

    Raises:
        R2FError: the start cannot be audited; the sentence says why.
    """
    if value is True:
        return "true"
    if isinstance(value, str) and value.lower() in ("gaussian", "eva"):
        return value.lower()
    shown = "null" if value is None else str(value).lower()
    family = "false" if value is None else "pissa" if shown.startswith("pissa") else shown  # null acts as false
    if family in REFUSED:
        raise R2FError(f"{where} has init_lora_weights {plain(shown, 60)}; {REFUSED[family]}.")
    raise R2FError(
        f"{where} has init_lora_weights {plain(value, 60)}, a start that is not known here: "
        "train with init_lora_weights=True."
    )


def shows_eva(weights: dict[str, Tensor]) -> bool:
    """Whether the rows of the A's are orthogonal as EVA makes them, singular vectors of the layers' inputs.

    Random rows have squared cosines of 1 / d_in on average; less than half of that is no chance.

    Args:
        weights: canonical names -> factors, A [r, d_in].
    """
    ratios = []
    for name, tensor in weights.items():
        a = tensor.flatten(1)
        rank, d_in = a.shape
        if ".lora_A." in name and 2 <= rank <= min(d_in, MAX_RANK):
            unit = torch.nn.functional.normalize(a.double(), dim=1)
            squared = float((unit @ unit.T).square().sum()) - rank
            ratios.append(squared / (rank * (rank - 1)) * d_in)
    return bool(ratios) and sum(ratios) / len(ratios) < 0.5
