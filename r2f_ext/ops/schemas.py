"""Every custom operator of r2f, by its schema. This file is the table of contents of `ops` and `csrc`.

An operator exists as `torch.ops.r2f.<name>` as soon as `r2f_ext.ops` is imported, on any machine: `reference.py` (or
`decoder_reference.py`) gives it a plain PyTorch kernel, and the compiled module, where there is one, adds faster
kernels for CPU and CUDA tensors. The dispatcher picks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "r2f"

SCHEMAS: dict[str, str] = {
    # LoRA-factor gradients of all layers for many groups. Without B (an empty list: every B is 0) grad_A is empty.
    "lora_grad": (
        "(Tensor[] x, Tensor[] delta, Tensor[] A, Tensor[] B, float[] scales) -> (Tensor[] grad_A, Tensor[] grad_B)"
    ),
    # How grad_B at B = 0 moves when x and delta do, in many directions at once.
    "lora_grad_tangent": (
        "(Tensor[] x, Tensor[] delta, Tensor[] dx, Tensor[] ddelta, Tensor[] A, float[] scales) -> Tensor[]"
    ),
    # Multilayer perceptrons. weights, biases: of the first decoder's linear layers, then of the second's, and so on.
    # saved: the pre-activations of the hidden layers, in the same order; empty if only outputs are wanted.
    # (No default: torch 2.11 hides an argument that equals its default from the registered backward.)
    "perceptrons": (
        "(Tensor[] inputs, Tensor[] weights, Tensor[] biases, bool with_saved) -> (Tensor[] outputs, Tensor[] saved)"
    ),
    # grad_inputs is empty unless needed.
    "perceptrons_backward": (
        "(Tensor[] grads, Tensor[] inputs, Tensor[] weights, Tensor[] saved, bool needs_inputs)"
        " -> (Tensor[] grad_inputs, Tensor[] grad_weights, Tensor[] grad_biases)"
    ),
    # totals[l][v] += sum_p weights[l][v, p] delta[l][p]^T x[l][p] for every layer l and victim v.
    "add_weighted_gradients_": "(Tensor(a!)[] totals, Tensor[] weights, Tensor[] x, Tensor[] delta) -> ()",
    # Distance between two lists of gradients for T trials, plus the total variation of their images.
    # sums [L, T, 4], float64: <c, o>, |c|^2, |o|^2, |c - o|^2 of each layer and trial. The weights sum to 1.
    # with_gradients: also compute grad_candidate and grad_images, the gradients of the sum of all losses. Otherwise
    # they are [] and a tensor of size 0.
    "matching_loss": (
        "(Tensor[] candidate, Tensor[] observed, float[] weights, str kind, Tensor images, float tv_weight,"
        " bool isotropic, bool with_gradients)"
        " -> (Tensor loss, Tensor sums, Tensor[] grad_candidate, Tensor grad_images)"
    ),
    "matching_loss_backward": (
        "(Tensor grad_loss, Tensor[] candidate, Tensor[] observed, Tensor sums, float[] weights, str kind,"
        " Tensor images, float tv_weight, bool isotropic) -> (Tensor[] grad_candidate, Tensor grad_images)"
    ),
    # The same for factored gradients G = delta^T x.
    # saved: on the CPU, Gram matrices and products of all layers, for the backward; its layout is the kernel's own.
    # Elsewhere it is empty.
    "factored_matching_loss": (
        "(Tensor[] x, Tensor[] delta, Tensor[] observed, float[] weights, str kind,"
        " Tensor images, float tv_weight, bool isotropic) -> (Tensor loss, Tensor sums, Tensor saved)"
    ),
    "factored_matching_loss_backward": (
        "(Tensor grad_loss, Tensor[] x, Tensor[] delta, Tensor[] observed, Tensor sums,"
        " Tensor saved, float[] weights, str kind, Tensor images, float tv_weight, bool isotropic)"
        " -> (Tensor[] grad_x, Tensor[] grad_delta, Tensor grad_images)"
    ),
    # One step of (signed) Adam and the projection onto a box, in place.
    "signed_adam_step_": (
        "(Tensor(a!) image, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float lr, float beta1,"
        " float beta2, float eps, int step, float? low, float? high, bool sign) -> ()"
    ),
}

_AUTOCAST = torch.library.Library(NAMESPACE, "FRAGMENT")


def _without_autocast(name: str, device: str) -> Callable[..., object]:
    """The operator with autocast disabled, so that its results have the dtypes that its wrapper documents."""

    def kernel(*args: object) -> object:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.r2f, name).default(*args)

    return kernel


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)
    for _device in ("cpu", "cuda"):
        _AUTOCAST.impl(_name, _without_autocast(_name, _device), f"Autocast{_device.upper()}")
