"""One forward and backward over many groups; every group's gradient as factors (x, delta).

All pairs are taken at the same parameters, so one batch serves many groups: a Linear layer's gradient of
group p is the sum over that group's tokens only. This is exact for models without batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from r2f_ext.errors import R2FError
from r2f_ext.gpu import float32_products
from r2f_ext.onednn import linear_layers
from r2f_ext.types import FactoredGradient, Target

# On a GPU, FlashAttention's backward adds blocks of 128 keys in no fixed order; with two, the order changes no bit. For
# heads of more than 64 numbers a block may hold 64 keys.
FUSED_TOKENS, WIDE_HEAD = 256, 64


class Capture:
    """Hooks on the adapted layers of a target; use it as a context manager and call it batch by batch.

    The model's own passes stay as they are: inputs and outputs are saved by reference, no parameter gets a gradient,
    and the backward stops at the output of the first adapted layer.

    Args:
        target: base model and adapted layers.
        dtype: float32 runs the model as it is; bfloat16 runs it under autocast (products of matrices in bfloat16, sums,
            softmax, norms and loss in float32) and gives factors in bfloat16. That is faster on processors that
            multiply bfloat16 matrices faster than float32 ones (GPUs, CPUs with AVX512_BF16 or AMX).
        tf32: on a GPU, multiply float32 numbers rounded to TF32's 11 bits.
        fused: in bfloat16 on a GPU, use fused attention for up to FUSED_TOKENS tokens (half as many if heads are wide;
            beyond that equal passes would not give equal bits). A pass that keeps its graph is never fused, because
            fused attention has no double backward. On a CPU a pass takes 4 % less time in float32, with twice the
            rounding error in early layers, and three times as long in bfloat16 (benchmarks/pairs/model_ablation.py).

    Raises:
        R2FError: the base has no such layer.

    Example:
        with Capture(target) as capture:
            gradient = capture(images, labels)
    """

    def __init__(
        self, target: Target, dtype: torch.dtype = torch.float32, tf32: bool = False, fused: bool = False
    ) -> None:
        self.target, self.dtype, self.tf32, self.fused = target, dtype, tf32, fused
        modules = dict(target.base.model.named_modules())
        absent = [name for name in target.names if name not in modules]
        if absent:
            raise R2FError(f"base '{target.base.spec}' has no layer {absent[0]}: pass the adapter's own base.")
        self._modules = {name: modules[name] for name in target.names}
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # Gradients below the first adapted layer are not needed: the backward stops at its output.
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            self._seen[name] = (args[0], output)
            return output

        return record

    def __call__(self, images: Tensor, labels: Tensor, create_graph: bool = False) -> FactoredGradient:
        """Gradients of the cross-entropy, averaged within each group, at the base's own weights.

        At PEFT's default start (B = 0) these are the gradients at every adapter's start, whatever its A.

        Args:
            images: [P, b, c, h, w], pixels in [0, 1]; P groups of b samples.
            labels: [P, b] int64.
            create_graph: keep the graph, so that the factors can be differentiated w.r.t. `images`.

        Returns:
            x[name] [P, b * tokens, d_in], delta[name] [P, b * tokens, d_out], of the capture's dtype (of the model's
            own dtype unless bfloat16 was asked for).

        Raises:
            R2FError: a layer does not run in the forward pass, or no adapted layer reaches the logits.
        """
        groups, size = labels.shape
        low = self.dtype == torch.bfloat16
        fused = self.fused and low and images.is_cuda and not create_graph
        with (
            torch.enable_grad(),
            float32_products(self.tf32),
            fused_attention(self.target.base.model, fused),
        ):
            with (
                torch.autocast(images.device.type, torch.bfloat16, enabled=low),
                linear_layers(images.is_cpu and not low),
            ):
                logits = self.target.base.model(self.target.base.normalize(images.flatten(0, 1)))
            logits = logits.float() if low else logits  # its gradient is a difference of probabilities
            loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / size
            outputs = [self._output(name) for name in self.target.names]
            if not loss.requires_grad:
                raise R2FError(
                    f"no adapted layer of base '{self.target.base.spec}' reaches its logits: LoRA on them does nothing."
                )
            # A layer whose output does not reach the logits (a pooling head beside the classifier) has gradient 0.
            grads = torch.autograd.grad(loss, outputs, create_graph=create_graph, materialize_grads=True)
        x, delta = {}, {}
        for name, grad in zip(self.target.names, grads, strict=True):
            module, inputs = self._modules[name], self._seen[name][0]
            tokens = as_tokens(module, inputs if create_graph else inputs.detach())
            grad = _output_as_tokens(module, grad)
            if low:  # autocast rounded both before the layer multiplied them
                tokens, grad = tokens.bfloat16(), grad.bfloat16()
            x[name] = tokens.reshape(groups, -1, tokens.shape[-1])
            delta[name] = grad.reshape(groups, -1, grad.shape[-1])
        self._seen.clear()
        return FactoredGradient(x, delta)

    def _output(self, name: str) -> Tensor:
        if name not in self._seen:
            raise R2FError(
                f"layer {name} of base '{self.target.base.spec}' does not run in its forward pass (its weight may be "
                "read from elsewhere), so that LoRA on it does nothing: train without it."
            )
        return self._seen[name][1]


@contextmanager
def fused_attention(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside this context, the attention layers of a timm or transformers `model` run FlashAttention, if `wanted`.

    Layers that offer no choice do not, nor do layers of more than `_most_tokens` tokens [n, tokens, d] on a GPU.
    """
    modules = model.modules() if wanted else ()
    switches = {module: switch for module in modules if (switch := _switch_of(module)) is not None}

    def choose(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = args[0] if args else named.get("hidden_states")
        switches[module].set(x is not None and x.ndim == 3 and (not x.is_cuda or x.shape[1] <= _most_tokens(module)))

    before = [getattr(switch.holder, switch.name) for switch in switches.values()]
    handles = [module.register_forward_pre_hook(choose, with_kwargs=True) for module in switches]
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) if wanted else nullcontext():
            yield
    finally:
        for switch, value, handle in zip(switches.values(), before, handles, strict=True):
            setattr(switch.holder, switch.name, value)
            handle.remove()


class _Switch(NamedTuple):
    """Where an attention layer reads whether it is fused: attribute `name` of `holder`."""

    holder: object
    name: str
    fused: object
    plain: object

    def set(self, fused: bool) -> None:
        setattr(self.holder, self.name, self.fused if fused else self.plain)


def _most_tokens(module: nn.Module) -> int:
    """Of an attention layer that is fused on a GPU."""
    head = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    return FUSED_TOKENS if head is not None and head <= WIDE_HEAD else FUSED_TOKENS // 2


def _switch_of(module: nn.Module) -> _Switch | None:
    """The switch of an attention layer of timm, or of one of transformers that calls the interface of attentions."""
    if hasattr(module, "fused_attn"):
        return _Switch(module, "fused_attn", True, False)
    if hasattr(module, "config") and hasattr(module, "is_causal"):
        return _Switch(module.config, "_attn_implementation", "sdpa", "eager")
    return None


def as_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as [samples, tokens, d_in], for Linear and patchifying Conv2d."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, stride=module.stride).mT
    return x.reshape(len(x), -1, x.shape[-1])


def _output_as_tokens(module: nn.Module, grad: Tensor) -> Tensor:
    """A layer's output gradient as [samples, tokens, d_out]."""
    return grad.flatten(2).mT if isinstance(module, nn.Conv2d) else grad.reshape(len(grad), -1, grad.shape[-1])


class ReplacedOutputs:
    """While entered, each module's output is replaced by replace(name, input, output)."""

    def __init__(self, modules: dict[str, nn.Module], replace: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        self.modules, self.replace = modules, replace

    def __enter__(self) -> None:
        self.handles = [
            module.register_forward_hook(lambda _, args, output, name=name: self.replace(name, args[0], output))
            for name, module in self.modules.items()
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
