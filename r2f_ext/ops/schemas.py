"""Every custom operator of r2f, by its schema. This file is the table of contents of `ops` and `csrc`.

An operator exists as `torch.ops.r2f.<name>` as soon as `r2f_ext.ops` is imported, on any machine: `reference.py` (or
`decoder_reference.py`) gives it a plain PyTorch kernel, and the compiled module, where there is one, adds faster
kernels for CPU and CUDA tensors. The dispatcher picks.
"""

from __future__ import annotations

import torch

NAMESPACE = "r2f"

SCHEMAS: dict[str, str] = {
    # LoRA-factor gradients of one linear layer for many groups, and the SGD-stepped factors.
    # Without lr, A1 and B1 are of size 0; without B, grad_A and A1 are expanded. With offsets, groups differ in size.
    "lora_grad": (
        "(Tensor x, Tensor delta, Tensor A, Tensor? B, float scale, float? lr, Tensor? offsets=None)"
        " -> (Tensor grad_A, Tensor grad_B, Tensor A1, Tensor B1)"
    ),
    # How they move when x and delta do, in many directions at once. Without B, grad_A is of size 0.
    "lora_grad_tangent": (
        "(Tensor x, Tensor delta, Tensor? dx, Tensor? ddelta, Tensor A, Tensor? B, float scale)"
        " -> (Tensor grad_A, Tensor grad_B)"
    ),
    # The decoders of L layers on one batch each: weights and biases layer by layer, bases and biases empty without any.
    # kept: what the backward needs, in one array (see decoder_reference.py).
    "decode": (
        "(Tensor[] inputs, Tensor[] weights, Tensor[] biases, Tensor[] bases, str activation, bool normalize)"
        " -> (Tensor[] outputs, Tensor kept)"
    ),
    # Lists are empty unless wanted.
    "decode_backward": (
        "(Tensor[] grads, Tensor[] inputs, Tensor[] weights, Tensor[] biases, Tensor[] bases, Tensor kept,"
        " str activation, bool normalize, bool to_inputs, bool to_weights, bool to_bases)"
        " -> (Tensor[] grad_inputs, Tensor[] grad_weights, Tensor[] grad_biases, Tensor[] grad_bases)"
    ),
    # Decoded gradients c basis against factored ones delta^T x, neither written out.
    # sums [L, b, 3], float64: <decoded, true>, |decoded|^2, |true|^2.
    "decoder_sums": "(Tensor[] coefficients, Tensor[] bases, Tensor[] x, Tensor[] delta) -> Tensor",
    "decoder_sums_backward": (
        "(Tensor grad_sums, Tensor[] coefficients, Tensor[] bases, Tensor[] x, Tensor[] delta, bool to_bases)"
        " -> (Tensor[] grad_coefficients, Tensor[] grad_bases)"
    ),
    # Distance between two lists of gradients for T trials, plus the total variation of their images.
    # sums [L, T, 4], float64: <c, o>, |c|^2, |o|^2, |c - o|^2 of each layer and trial. The weights sum to 1.
    # with_gradients: grad_candidate and grad_images of the sum of all losses; without, they are [] and of size 0.
    "matching_loss": (
        "(Tensor[] candidate, Tensor[] observed, float[] weights, str kind, Tensor images, float tv_weight,"
        " bool isotropic, bool with_gradients)"
        " -> (Tensor loss, Tensor sums, Tensor[] grad_candidate, Tensor grad_images)"
    ),
    "matching_loss_backward": (
        "(Tensor grad_loss, Tensor[] candidate, Tensor[] observed, Tensor sums, float[] weights, str kind,"
        " Tensor images, float tv_weight, bool isotropic) -> (Tensor[] grad_candidate, Tensor grad_images)"
    ),
    # The same for factored gradients G = delta^T x. observed_delta is [] if the observed gradients are dense.
    # saved: Gram matrices and products of all layers, for the backward; its layout is the kernel's own.
    "factored_matching_loss": (
        "(Tensor[] x, Tensor[] delta, Tensor[] observed, Tensor[] observed_delta, float[] weights, str kind,"
        " Tensor images, float tv_weight, bool isotropic) -> (Tensor loss, Tensor sums, Tensor saved)"
    ),
    "factored_matching_loss_backward": (
        "(Tensor grad_loss, Tensor[] x, Tensor[] delta, Tensor[] observed, Tensor[] observed_delta, Tensor sums,"
        " Tensor saved, float[] weights, str kind, Tensor images, float tv_weight, bool isotropic)"
        " -> (Tensor[] grad_x, Tensor[] grad_delta, Tensor grad_images)"
    ),
    # One step of (signed) Adam and the projection onto a box, in place.
    "signed_adam_step_": (
        "(Tensor(a!) image, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float lr, float beta1,"
        " float beta2, float eps, int step, float? low, float? high, bool sign) -> ()"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)
