"""The operators. Importing this defines them all on plain PyTorch, then loads the compiled kernels if they fit."""

from . import schemas  # isort: skip  (defines the operators; everything below needs them)
from . import decoder_reference
from .add_weighted_gradients import add_weighted_gradients_
from .backend import backend_of, build_information, load_compiled_kernels
from .factored_matching_loss import factored_matching_loss
from .lora_grad import LoraGrad, lora_grad
from .lora_grad_tangent import lora_grad_tangent
from .matching_loss import matching_loss
from .perceptrons import perceptrons
from .signed_adam_step import signed_adam_step_

load_compiled_kernels()

__all__ = [
    "LoraGrad",
    "add_weighted_gradients_",
    "backend_of",
    "build_information",
    "decoder_reference",
    "factored_matching_loss",
    "lora_grad",
    "lora_grad_tangent",
    "matching_loss",
    "perceptrons",
    "schemas",
    "signed_adam_step_",
]
