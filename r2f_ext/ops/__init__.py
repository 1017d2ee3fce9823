"""The operators. Importing this defines them all on plain PyTorch, then loads the compiled kernels if they fit."""

from . import schemas  # isort: skip  (defines the operators; everything below needs them)
from .backend import backend_of, build_information, load_compiled_kernels
from .lora_grad import LoraGrad, lora_grad
from .lora_grad_tangent import LoraGradTangent, lora_grad_tangent

load_compiled_kernels()

__all__ = [
    "LoraGrad",
    "LoraGradTangent",
    "backend_of",
    "build_information",
    "lora_grad",
    "lora_grad_tangent",
    "schemas",
]
