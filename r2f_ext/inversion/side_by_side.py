"""Gauss-Newton searches of several victims that take their passes together (docs/methods.md, 3f).

A pass is one of four kinds, see `Kind`. All victims whose next pass is of one kind take it in one batch: a GPU is
filled and waited for once, and on a CPU the model's overhead, most of the time of a single small image, is shared.
Where a search ends, the next victim takes its place. Up to rounding, each search takes the steps that it would alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from itertools import cycle
from math import inf

import torch
from torch import Tensor

from r2f_ext.inversion.dense_newton import newton_steps, newtons_together
from r2f_ext.inversion.descents import descents, freed_descents, in_parts
from r2f_ext.inversion.linearisation import Axes, Cloud, drawn, linearised_steps
from r2f_ext.inversion.newton import ARRIVED, NEARLY_ARRIVED, PRECISE, SOLVED, STALLED, Search
from r2f_ext.inversion.task import NEAR, GaussNewtonConfig, Task

# Relative residual above which passes are descents and clouds only. Between NEAR and FAR, descent (and a pass with free
# positions) and clouds alternate whenever one stalls.
FAR = 0.1
# Shares of J^T J's largest eigenvalue: the damping of the first descent and the smallest damping; and the factor from
# one damping to the next. With less damping from the start, steps leave the valley.
DAMPING, LEAST_DAMPING, SOFTER = 1e-3, 1e-9, 0.1
# Relative residual below which passes in float64 change nothing: 3e-7 is what float32, in which victims train, leaves.
ROUNDING = 1e-6
OUTSIDE = 0.02  # root mean square distance to [0, 1] up to which a point counts as an image with errors
CPU_TOGETHER = 8  # victims; with more, a descent takes hardly less time for each


class Kind(Enum):
    """How a pass moves: descent along the misfit, descent with patches that are free to change places, a regression
    over a cloud of images, or steps with a derivative."""

    DESCENT = "descent"
    FREED = "freed"
    CLOUD = "cloud"
    NEWTON = "newton"


Choice = Callable[[Kind | None, float, float], Kind]  # last kind, residuals before and after it -> the next kind


def next_kind(last: Kind | None, before: float, residual: float, frees: bool, near: float = NEAR) -> Kind:
    """Newton below `near`; farther away descent until it stalls, then clouds.

    Where descent and Newton stall below FAR, patches may change places, if there are any.

    Args:
        last: None at the start of the first search.
        before: infinite at the start of a search.
        frees: whether patches can be freed.
    """
    stalled = not residual <= STALLED * before  # also where it is NaN
    if residual < near:
        if not (last is Kind.NEWTON and stalled):
            return Kind.NEWTON
        return Kind.FREED if frees else Kind.DESCENT
    if last is None:
        return Kind.DESCENT
    if residual > FAR:
        return Kind.DESCENT if last is Kind.DESCENT and not stalled else Kind.CLOUD
    if not stalled:
        return Kind.DESCENT if last is Kind.FREED else last
    if frees and last is Kind.DESCENT:
        return Kind.FREED
    return Kind.DESCENT if last is Kind.CLOUD else Kind.CLOUD


@dataclass
class _Course:
    """The state of one search.

    Attributes:
        start: the point [p] that it starts from.
        first: residual at the start.
        samples: images per direction in the clouds of one search after another.
        generator: of the clouds, and of the points near the start.
        cloud: that the next regression draws.
        kind: of the next pass.
        residual: at the point where the last pass ended.
        lowest: residual after the last improvement, or where the search last began. A pass that undercuts it by a fifth
            is an improvement.
        least: residual by which the best image was chosen: clamped to [0, 1] or, where the update has errors and the
            point is nearly inside, as it is.
        reached: residual of the best image, clamped to [0, 1].
        freed: the freed image [p'] where the next pass with free positions begins; None: at the point.
        count: passes taken.
        since: passes without an improvement.
        improved: the last pass of this search was an improvement.
        seconds: time of its passes.
        damping: of the next descent, see `preconditioned_descent`.
        ended: no pass follows.
        stopped: the time limit ended it.
    """

    start: Tensor
    first: float
    samples: cycle[float]
    generator: torch.Generator
    cloud: Cloud = field(init=False)
    kind: Kind = field(init=False)
    residual: float = field(init=False)
    lowest: float = field(init=False)
    least: float = field(init=False)
    reached: float = field(init=False)
    freed: Tensor | None = None
    count: int = 0
    since: int = 0
    improved: bool = False
    seconds: float = 0.0
    damping: float = DAMPING
    ended: bool = False
    stopped: bool = False

    def __post_init__(self) -> None:
        self.least = self.reached = self.first

    def begin(self, residual: float, axes: Axes, choose: Choice) -> None:
        """Begin a search, the first or a further one, at a point of this residual."""
        self.residual = self.lowest = residual
        self.since, self.improved, self.damping, self.freed = 0, False, DAMPING, None
        self.cloud, self.kind = Cloud(axes.covariance, samples=next(self.samples)), choose(None, inf, residual)

    @property
    def converges(self) -> bool:
        """Whether a pass of Newton's steps is next, and the last pass was an improvement."""
        return self.kind is Kind.NEWTON and self.improved

    def found(self, image: Tensor) -> Search:
        return Search(image, self.reached, self.first, self.count, self.stopped, self.seconds)


def search_together(
    task: Task,
    starts: Tensor,
    config: GaussNewtonConfig,
    axes: Sequence[Axes],
    together: int,
    choose: Choice | None = None,
    restarts: bool = True,
) -> Iterator[tuple[int, Search]]:
    """Follow V searches from starts [V, p] in [0, 1] to the images whose updates are observed.

    Args:
        axes: of each victim's clouds.
        together: how many victims take their passes together.
        choose: the kind of the next pass; None: `next_kind`.
        restarts: begin again near the start, with new clouds, where passes no longer improve.

    Yields:
        (victim, its best point and figures), in the order in which the searches end.
    """
    choose = choose or partial(next_kind, frees=task.freed is not None, near=task.near)
    searches = _Searches(task, starts, config, axes, choose, restarts)
    waiting, active = deque(range(len(starts))), list[int]()
    while waiting or active:
        entering = [waiting.popleft() for _ in range(min(together - len(active), len(waiting)))]
        if entering:
            searches.enter(entering)
        active += entering
        courses = searches.courses
        yield from ((victim, searches.found(victim)) for victim in active if courses[victim].ended)
        active = [victim for victim in active if not courses[victim].ended]
        if waiting and len(active) < together:
            continue
        groups = [(kind, [victim for victim in active if courses[victim].kind is kind]) for kind in Kind]
        for kind, victims in groups:
            if victims:
                searches.take_pass(kind, victims)


class _Searches:
    """The points [V, p] and values [V, R] of V searches, their best images [V, p], and where each stands."""

    def __init__(
        self,
        task: Task,
        starts: Tensor,
        config: GaussNewtonConfig,
        axes: Sequence[Axes],
        choose: Choice,
        restarts: bool,
    ) -> None:
        self.task, self.starts, self.config, self.axes = task, starts, config, axes
        self.choose, self.restarts = choose, restarts
        self.points, self.best, self.values = starts.clone(), starts.clone(), torch.empty_like(task.observed)
        self.courses: dict[int, _Course] = {}
        self.solved, self.precise = max(SOLVED, ARRIVED * task.noise), max(PRECISE, NEARLY_ARRIVED * task.noise)

    def enter(self, victims: Sequence[int]) -> None:
        """Begin the searches of these victims."""
        for victim, residual in zip(victims, self._evaluated(victims), strict=True):
            generator = torch.Generator(self.starts.device).manual_seed(self.config.seed)
            course = _Course(self.starts[victim], residual, cycle(self.config.samples), generator)
            course.begin(residual, self.axes[victim], self.choose)
            course.ended = not residual > SOLVED or self.config.passes < 1
            self.courses[victim] = course
            self._stop_where_time_is_up(course)

    def take_pass(self, kind: Kind, victims: Sequence[int]) -> None:
        """One pass of these victims, all of one kind; its time is divided among them."""
        began, rows, config = time.perf_counter(), self._rows(victims), self.config
        courses, axes = [self.courses[victim] for victim in victims], [self.axes[victim] for victim in victims]
        points, values = _moved(kind, self.task, rows, self.points[rows], self.values[rows], config, axes, courses)
        self.points[rows], self.values[rows] = points, values
        images = points.clamp(0, 1)  # solutions outside the box are not the image
        reached = self.task.residuals(self.task.update_of(images, rows), rows)
        residuals = self.task.residuals(values, rows)
        outside = (points - images).square().mean(1).sqrt().tolist()
        for place, (victim, course) in enumerate(zip(victims, courses, strict=True)):
            # Where the update has errors, so have the pixels of the best fit, and those that are clamped then fit
            # worse than before: points that are nearly inside are compared as they are.
            unclamped = self.task.noise > 0 and outside[place] < OUTSIDE
            compared = residuals[place] if unclamped else reached[place]
            if compared < course.least:
                course.least, course.reached, self.best[victim] = compared, reached[place], images[place]
            if self._judged(course, residuals[place]):
                self._begin_again(victim)
        seconds = (time.perf_counter() - began) / len(victims)
        for course in courses:
            course.seconds += seconds
            self._stop_where_time_is_up(course)

    def found(self, victim: int) -> Search:
        """What a victim's search has found so far."""
        return replace(self.courses[victim].found(self.best[victim].clone()), noise=self.task.noise)

    def _judged(self, course: _Course, residual: float) -> bool:
        """Record a pass that ended at `residual`, choose the next one, and return whether the search begins again."""
        before, course.residual = course.residual, residual
        course.count += 1
        course.improved = residual < STALLED * course.lowest
        course.lowest, course.since = (residual, 0) if course.improved else (course.lowest, course.since + 1)
        course.freed = None if course.improved else course.freed
        # A descent that ends at the noise is not yet the best fit: directions that the update hardly shows are open.
        settled = course.kind is Kind.NEWTON or not self.task.noise
        fits, precise = course.least <= self.solved, course.least < self.precise
        # Along directions that the update hardly shows, the point keeps errors that float32 cannot remove; they show
        # when its pixels are clamped. `finished` goes on from there in float64.
        single = self.points.dtype == torch.float32
        at_limit = course.kind is Kind.NEWTON and (before <= self.solved if single else residual <= ROUNDING)
        arrived = (settled and fits) or (precise and (at_limit or course.since == 2))
        if arrived or course.count >= self.config.passes:
            course.ended = True
        elif course.since < self.config.patience:
            _choose(course, before, self.choose, self.task)
        elif self.restarts:
            return True
        else:
            course.ended = True
        return False

    def _rows(self, victims: Sequence[int]) -> Tensor:
        return torch.tensor(victims, device=self.starts.device)

    def _evaluated(self, victims: Sequence[int]) -> list[float]:
        """Map these victims' points, and return their residuals."""
        rows = self._rows(victims)
        self.values[rows] = self.task.update_of(self.points[rows], rows)
        return self.task.residuals(self.values[rows], rows)

    def _begin_again(self, victim: int) -> None:
        course, axes = self.courses[victim], self.axes[victim]
        self.points[victim] = _nearby(course.start, axes, self.config.spread, course.generator)
        (residual,) = self._evaluated([victim])
        course.begin(residual, axes, self.choose)

    def _stop_where_time_is_up(self, course: _Course) -> None:
        limit = inf if self.config.minutes is None else 60 * self.config.minutes
        # Few passes are left of a search that converges, and without them a found image is not exact.
        if not course.ended and course.seconds >= limit and not course.converges:
            course.ended = course.stopped = True


def _choose(course: _Course, before: float, choose: Choice, task: Task) -> None:
    """Choose the kind of the next pass, and the damping of the next descent.

    A descent that reduced the residual by a fifth lowers the damping. A stalled one raises it and is repeated, unless
    the damping is at its highest, the residual is below `task.near`, or a pass with free positions is possible. In
    all other cases `choose` decides.
    """
    if course.kind is Kind.DESCENT:
        stalled, last = not course.residual <= STALLED * before, course.damping
        course.damping = min(max(last / SOFTER if stalled else last * SOFTER, LEAST_DAMPING), DAMPING)
        frees = task.freed is not None and course.residual <= FAR
        if stalled and course.damping > last and course.residual >= task.near and not frees:
            return
    course.kind = choose(course.kind, before, course.residual)


def _nearby(start: Tensor, axes: Axes, spread: float, generator: torch.Generator) -> Tensor:
    """A random point [p] around the start [p], in [0, 1]."""
    (shift,) = drawn(axes, axes.covariance, 1, generator, start)
    return (start + spread * shift).clamp(0, 1)


def _moved(
    kind: Kind,
    task: Task,
    rows: Tensor,
    points: Tensor,
    values: Tensor,
    config: GaussNewtonConfig,
    axes: Sequence[Axes],
    courses: Sequence[_Course],
) -> tuple[Tensor, Tensor]:
    """One pass of the victims `rows`, with the axes and course of each: the next points [n, p] and values [n, R]."""
    if kind is Kind.NEWTON:
        few = newtons_together(points.device, task.subspace.basis.shape[1], values.shape[1])
        points, values = in_parts(few, partial(newton_steps, task, config=config), rows, points, values)
        return points, values
    if kind is Kind.FREED:
        points, values, ended = freed_descents(task, rows, points, values, [course.freed for course in courses])
        for course, one in zip(courses, ended, strict=True):
            course.freed = one
        return points, values
    if kind is Kind.DESCENT:
        starts = torch.stack([course.start for course in courses])
        dampings = points.new_tensor([course.damping for course in courses], dtype=torch.float64)
        return descents(task, rows, points, starts, dampings, axes)
    points, values, clouds = linearised_steps(
        lambda images, owners: task.update_of(images, rows[owners]),
        task.observed[rows],
        points,
        values,
        axes,
        [course.cloud for course in courses],
        [course.generator for course in courses],
    )
    for course, cloud in zip(courses, clouds, strict=True):
        course.cloud = cloud
    return points, values


def victims_together(device: torch.device, directions: int, numbers: int) -> int:
    """How many searches go side by side: a few on a CPU, on a GPU as many as fit.

    Args:
        directions: q of the subspace; numbers: R of an update.
    """
    return newtons_together(device, directions, numbers) if device.type == "cuda" else CPU_TOGETHER
