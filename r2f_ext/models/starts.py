"""What PEFT's `init_lora_weights` does to A, B and the base, and which starts can be audited.

The sentences state what peft.tuners.lora.layer.LoraLayer does in each of its `*_init` methods.
"""

from __future__ import annotations

from typing import Any

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
        "orthogonal: B starts from random numbers that are not in the file, so B does not show the training alone; "
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
EVA_LEAK = (
    "init_lora_weights is 'eva': EVA makes A from the inputs that the layers see on the training data, so A itself "
    "gives away the directions that these inputs span."
)
# Configurations that act only through init_lora_weights; PEFT ignores them under any other start.
START_CONFIGS = {"eva_config": "EVA", "corda_config": "CorDA", "lora_ga_config": "LoRA-GA", "loftq_config": "LoftQ"}


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
