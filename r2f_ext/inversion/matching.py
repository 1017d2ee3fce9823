"""Gradient matching (Zhu et al., 2019; Geiping et al., 2020): searches for images whose gradient is the observed one.

A trial is one start of the search for one victim's group of images. All trials of all victims go through the model as
one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from r2f_ext.cuda_graph import Replayed
from r2f_ext.errors import R2FError
from r2f_ext.files import sha256_of, write_tensors
from r2f_ext.gpu import float32_products
from r2f_ext.inversion.candidates import Candidates, candidates_of
from r2f_ext.inversion.objectives import Candidate, Distance, Objective
from r2f_ext.inversion.optimizers import LBFGS, Adam, Box, Optimizer
from r2f_ext.ops.matching_loss import KINDS
from r2f_ext.types import BaseModel, Gradient, Reconstruction, Target

SCHEDULES: dict[str, Callable[[int, int], float]] = {  # (step, steps) -> factor on the step size
    "constant": lambda step, steps: 1.0,
    "step": lambda step, steps: 0.1 ** sum(step >= steps * k // 8 for k in (3, 5, 7)),
    "linear": lambda step, steps: 1 - step / steps,
    "cosine": lambda step, steps: 0.5 + 0.5 * math.cos(math.pi * step / steps),
}
OPTIMIZERS: dict[str, Callable[[Tensor, Box], Optimizer]] = {
    "signed_adam": lambda images, box: Adam(images, box, sign=True),
    "adam": lambda images, box: Adam(images, box, sign=False),
    "lbfgs": LBFGS,
}
SECOND_ORDERS = ("auto", "double_backward", "central_differences")
SAME_SLOPE = 0.9  # cosine between the slopes by double backward and by central differences above which they agree
CHECK_EVERY = 10  # steps between checks of the losses on the host, which synchronise a GPU

Prior = Callable[[Tensor, int], Tensor]  # (images [n, c, h, w], step) -> a gradient of the images' shape


@dataclass(frozen=True)
class MatchingConfig:
    """Settings of the search.

    Attributes:
        steps: the largest number of steps, each one evaluation of loss and slope. One more evaluation gives the loss of
            the last images.
        step_size: in the unit of pixels in [0, 1].
        schedule: of the step size: "constant", "step" (divided by 10 after 3/8, 5/8 and 7/8), "linear" or "cosine".
        tv_weight: the weight of the total variation.
        isotropic: isotropic or anisotropic total variation (see `ops.matching_loss`).
        loss: "layer_cosine", "cosine" or "l2" (see `ops.matching_loss`).
        layer_weights: layer -> weight >= 0; 1 for layers that are not named.
        optimizer: "signed_adam", "adam" or "lbfgs".
        low, high: bounds of the pixels; both or neither may be None, for no bounds.
        restarts: trials for each victim. The first begins at the start, the others at start + spread * (u - start)
            with u uniform in [0, 1], drawn from `seed`.
        second_order: "double_backward", "central_differences" of first-order passes, or "auto": double backward if the
            model supports it and both give the same slope at the start. Fused attention does not support it; for ReLU
            networks the slopes differ.
        patience: stop when in this many steps (checked every tenth step) no trial's loss fell by the fraction
            `tolerance`; None: never.

    Raises:
        R2FError: an invalid value, named in the message.
    """

    steps: int = 120
    step_size: float = 0.05
    tv_weight: float = 0.05
    schedule: str = "step"
    isotropic: bool = False
    loss: str = "layer_cosine"
    layer_weights: dict[str, float] = field(default_factory=dict)
    optimizer: str = "signed_adam"
    low: float | None = 0.0
    high: float | None = 1.0
    restarts: int = 1
    spread: float = 1.0
    second_order: str = "auto"
    patience: int | None = None
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            (self.steps < 0, f"steps is {self.steps}: at least 0"),
            (not self.step_size > 0, f"step_size is {self.step_size}: above 0"),
            (not self.tv_weight >= 0, f"tv_weight is {self.tv_weight}: at least 0"),
            (self.schedule not in SCHEDULES, f"schedule is '{self.schedule}': one of {', '.join(SCHEDULES)}"),
            (self.loss not in KINDS, f"loss is '{self.loss}': one of {', '.join(KINDS)}"),
            (self.optimizer not in OPTIMIZERS, f"optimizer is '{self.optimizer}': one of {', '.join(OPTIMIZERS)}"),
            ((self.low is None) != (self.high is None), "low and high go together: give both or neither"),
            (self.box is not None and self.box[0] >= self.box[1], f"the box is {self.box}: low below high"),
            (self.restarts < 1, f"restarts is {self.restarts}: at least 1"),
            (self.second_order not in SECOND_ORDERS, f"second_order is '{self.second_order}': one of {SECOND_ORDERS}"),
            (self.patience is not None and self.patience < 1, f"patience is {self.patience}: at least 1, or None"),
            (any(not w >= 0 for w in self.layer_weights.values()), "layer_weights are not below 0"),
        ]
        for is_wrong, sentence in wrong:
            if is_wrong:
                raise R2FError(f"gradient matching cannot run: {sentence}.")

    @property
    def box(self) -> Box:
        return None if self.low is None or self.high is None else (self.low, self.high)


@float32_products()
def match(
    model: Target | BaseModel,
    objective: Objective,
    start: Tensor | Reconstruction,
    labels: Tensor,
    config: MatchingConfig,
    route: str,
    why: str,
    on_step: Callable[[], None] = lambda: None,
    state: Path | None = None,
    watch: Callable[[Tensor], None] | None = None,
    prior: Prior | None = None,
) -> Reconstruction:
    """Minimise objective + total variation over the images of V victims at once.

    The result holds, for each victim, the best images of its best trial.

    Args:
        model: a target, for factored gradients of its layers; or any base model, for an objective on dense gradients of
            its parameters.
        objective: what was observed of V victims. A gradient averaged over several training steps is matched by groups
            of all images of those steps, at the initial weights.
        start: [V, c, h, w] in [0, 1], or groups [V, b, c, h, w] whose gradients are averaged, or the reconstruction of
            another route.
        labels: [V] or [V, b] int64, assumed known: see `inversion.labels`.
        route, why: recorded in the result, see `Reconstruction`.
        on_step: called after each step, for progress bars.
        state: a file to which the search is saved every CHECK_EVERY steps. If it exists, the search resumes from it and
            gives the same bits as an uninterrupted one.
        watch: called after each step with the best images so far [V, b, c, h, w].
        prior: a gradient that is added to the slope at the images of all trials (see `ScoreDistillation.gradient`).

    Returns:
        images of the start's shape; details: steps taken, loss_start and loss_end (means over the victims' best
        trials), restarts, central_differences (0 or 1).

    Raises:
        R2FError: the observation is not finite, zero, or does not fit the model, the start or the labels; or the state
            file belongs to another search.
    """
    began = time.perf_counter()
    images = start.images if isinstance(start, Reconstruction) else start
    candidates = candidates_of(model, objective.shapes)
    base = model.base if isinstance(model, Target) else model
    groups, group_labels = _groups(base, images, labels)
    _check_observed(objective, candidates, len(groups))
    weights = _weights(objective, config)
    search = _Search(
        candidates, objective.repeat(config.restarts), weights, _starts(groups, config), group_labels, config, prior
    )
    if state is not None:
        search.resume(state)
    for _ in search.run(state):
        on_step()
        if watch is not None:
            watch(search.best_of_victims(len(groups))[0])
    best, loss = search.best_of_victims(len(groups))
    details = {
        "steps": search.step,
        "loss_start": float(search.first_loss.view(len(groups), -1).amin(1).mean()),
        "loss_end": float(loss.mean()),
        "restarts": config.restarts,
        "central_differences": int(search.central),
    }
    return Reconstruction(route, best.view_as(images), labels, why, time.perf_counter() - began, details)


class _Search:
    """The state of T trials: the images and everything else that later steps depend on."""

    def __init__(
        self,
        candidates: Candidates,
        objective: Objective,
        weights: list[float],
        images: Tensor,
        labels: Tensor,
        config: MatchingConfig,
        prior: Prior | None,
    ) -> None:
        self.candidates, self.objective, self.config = candidates, objective, config
        self.distance = Distance(config.loss, weights, config.tv_weight, config.isotropic)
        self.prior = prior
        self.images, self.labels = images, labels.repeat_interleave(config.restarts, dim=0)
        self.optimizer = OPTIMIZERS[config.optimizer](images, config.box)
        self.best, self.best_loss = images.clone(), images.new_full((len(images),), math.inf)
        self.first_loss = self.best_loss.clone()
        self.mark, self.marked_at, self.step = self.best_loss.clone(), 0, 0
        # The prior's gradient at the start identifies it: it depends on the prior's weights, strength and seed.
        prior_gradient = [] if prior is None else [prior(images.flatten(0, 1), 0)]
        self.fingerprint = sha256_of([images, self.labels, *objective.tensors(), *prior_gradient])
        self.fingerprint += repr((config, objective.shapes))
        self.central = config.second_order == "central_differences"

    def run(self, state: Path | None) -> Iterator[int]:
        """Yields the step number after each step, up to the last or until patience ends; then evaluates the result."""
        steps = self.config.steps
        if self.config.second_order == "auto" and self.step == 0 and steps > 0:
            self.central = not self._double_backward_works()
        # One capture serves all steps: it depends on the images alone, and the rest of the state is outside it.
        evaluate = Replayed(self._by_central_differences if self.central else self._by_double_backward)
        while self.step < steps and not self._stalled():
            loss, slope = evaluate(self.images, self.labels)
            if self.prior is not None:
                slope = slope + self.prior(self.images.flatten(0, 1), self.step).view_as(slope)
            self._record(loss)
            size = self.config.step_size * SCHEDULES[self.config.schedule](self.step, steps)
            self.optimizer.step(self.images, loss, slope, size, self.step + 1)
            self.step += 1
            if state is not None and self.step % CHECK_EVERY == 0:
                self.save(state)
            yield self.step
        self._record(self._loss(self.candidates(self.images, self.labels), self.images).detach())

    def _record(self, loss: Tensor) -> None:
        if self.step == 0:
            self.first_loss = loss.clone()
            if not torch.isfinite(loss).all():
                raise R2FError("the matching loss is not finite at the start: is the start, or the model, not finite?")
        better = loss < self.best_loss
        self.best = torch.where(_column(better, self.images), self.images, self.best)
        self.best_loss = torch.where(better, loss, self.best_loss)

    def _stalled(self) -> bool:
        if self.config.patience is None or self.step % CHECK_EVERY:
            return False
        if bool((self.best_loss < self.mark * (1 - self.config.tolerance)).any()):
            self.mark, self.marked_at = self.best_loss.clone(), self.step
        return self.step - self.marked_at >= self.config.patience

    def _by_double_backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [T] and its slope at the images."""
        images = images.detach().requires_grad_()
        loss = self._loss(self.candidates(images, labels, create_graph=True), images)
        (slope,) = torch.autograd.grad(loss.sum(), [images])
        return loss.detach(), slope

    def _by_central_differences(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same for models without a second derivative, or with one that misses most of the slope."""
        dense = _dense(self.candidates(images, labels))
        leaves = [gradient.requires_grad_() for gradient in dense.dense.values()]
        varied = images.detach().requires_grad_()
        loss = self._loss(dense, varied)
        *direction, variation_slope = torch.autograd.grad(loss.sum(), [*leaves, varied])
        along = dict(zip(dense.dense, direction, strict=True))
        return loss.detach(), variation_slope + self.candidates.slope_along(images, labels, along)

    def _loss(self, gradient: Candidate, images: Tensor) -> Tensor:
        return self.objective(gradient, images.flatten(1, 2), self.distance)

    def _double_backward_works(self) -> bool:
        """Whether the model supports double backward and its slope at the start agrees with central differences.

        The gradient of a network of ReLU and max-pooling is discontinuous. Second derivatives do not see the jumps,
        which may hold most of the slope (docs/routes.md, Gradient matching).
        """
        by_differences = self._by_central_differences(self.images, self.labels)[1].flatten(1)
        try:
            exact = self._by_double_backward(self.images, self.labels)[1].flatten(1)
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            return False
        return bool(F.cosine_similarity(exact, by_differences).quantile(0.5) > SAME_SLOPE)

    def best_of_victims(self, victims: int) -> tuple[Tensor, Tensor]:
        """Images [V, b, c, h, w] and loss [V] of each victim's best trial."""
        losses = self.best_loss.view(victims, -1)
        loss, trial = losses.min(1)
        index = trial + torch.arange(victims, device=trial.device) * losses.shape[1]
        return self.best[index], loss

    def _tensors(self) -> dict[str, Tensor]:
        own = ("images", "best", "best_loss", "first_loss", "mark")
        return {**{name: getattr(self, name) for name in own}, **self.optimizer.state}

    def save(self, path: Path) -> None:
        numbers = {"step": str(self.step), "marked_at": str(self.marked_at), "central": str(int(self.central))}
        write_tensors(path, self._tensors(), {**numbers, "search": self.fingerprint})

    def resume(self, path: Path) -> None:
        """Load the state in `path`, if the file exists."""
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise R2FError(f"'{path}' is not the state of a search: delete it to start anew.") from error
        if metadata.get("search") != self.fingerprint:
            raise R2FError(f"'{path}' is the state of another search: delete it, or name another file.")
        for name, tensor in found.items():
            tensor = tensor.to(self.images.device)
            if name in self.optimizer.state:
                self.optimizer.state[name] = tensor
            else:
                setattr(self, name, tensor)
        self.step, self.marked_at = int(metadata["step"]), int(metadata["marked_at"])
        self.central = metadata["central"] == "1"


def _dense(candidate: Candidate) -> Gradient:
    if isinstance(candidate, Gradient):
        return candidate
    return Gradient({name: candidate.dense(name) for name in candidate.x})


def _column(which: Tensor, like: Tensor) -> Tensor:
    return which.view(-1, *[1] * (like.ndim - 1))


def _starts(groups: Tensor, config: MatchingConfig) -> Tensor:
    """[V, b, c, h, w] -> the starts of all trials [V * restarts, b, c, h, w]."""
    if config.restarts == 1:
        return groups.clone(memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(config.seed)
    others = groups[:, None].expand(-1, config.restarts - 1, *groups.shape[1:])
    noise = torch.rand(others.shape, generator=generator, dtype=torch.float64).to(groups)
    return torch.cat([groups[:, None], others + config.spread * (noise - others)], dim=1).flatten(0, 1)


def _groups(base: BaseModel, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The start and the labels as groups [V, b, c, h, w] and [V, b], checked."""
    groups = images[:, None] if images.ndim == 4 else images
    labels = labels[:, None] if labels.ndim == 1 else labels
    if groups.ndim != 5 or tuple(groups.shape[2:]) != tuple(base.input_shape) or groups.shape[:2] != labels.shape:
        raise R2FError(
            f"a start {list(images.shape)} with labels {list(labels.shape)} does not fit the base's input "
            f"{list(base.input_shape)}: give [victims, c, h, w] or [victims, images of a group, c, h, w]."
        )
    if len(groups) == 0:
        raise R2FError("gradient matching needs at least one victim.")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= base.num_classes:
        raise R2FError(f"labels must be whole numbers from 0 to {base.num_classes - 1}, the classes of '{base.spec}'.")
    if not torch.isfinite(groups).all():
        raise R2FError("the start of the search is not finite: choose another.")
    return groups.detach().to(base.device), labels.to(base.device)


def _check_observed(objective: Objective, candidates: Candidates, victims: int) -> None:
    if not objective.shapes:
        raise R2FError("nothing was observed: the gradient or update has no layers.")
    for name, shape in objective.shapes.items():
        if candidates.shapes[name] != shape:
            raise R2FError(
                f"the observation of {name} fits a layer {list(shape)}, but the model's is "
                f"{list(candidates.shapes[name])}: pass its own base."
            )
    norms = objective.norms()
    if len(norms) not in (1, victims):
        raise R2FError(f"gradients of {len(norms)} victims were observed, but the start has {victims}.")
    for name, norm in zip(objective.shapes, norms.unbind(1), strict=True):
        if not torch.isfinite(norm).all():
            raise R2FError(f"the observation of {name} is not finite: it holds NaN or infinity.")
    zero = (norms == 0).all(1).nonzero()
    if len(zero):
        raise R2FError(
            f"the observed gradient of victim {int(zero[0])} is zero in every layer: the model has converged on its "
            "data, or was not trained, and nothing can be matched."
        )


def _weights(objective: Objective, config: MatchingConfig) -> list[float]:
    absent = [name for name in config.layer_weights if name not in objective.shapes]
    if absent:
        raise R2FError(f"layer_weights names {absent[0]}, which was not observed.")
    weights = [config.layer_weights.get(name, 1.0) for name in objective.shapes]
    if not sum(weights) > 0:
        raise R2FError("layer_weights are all zero: nothing would be matched.")
    return weights
