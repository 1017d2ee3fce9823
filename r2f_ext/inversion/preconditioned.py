"""Preconditioned L-BFGS on the misfits of several images' updates at once, held near the start (docs/methods.md, 3f).

The misfit has narrow and curved valleys: J^T J has eigenvalues over many orders of magnitude, and a long step of
Gauss-Newton leaves the valley. In coordinates in which J^T J, damped, is the identity, many short steps with exact
gradients follow it. Such a step costs about a two-hundredth of a Jacobian.

From a start of 18 dB, descent often ends at a local minimum that is not the image and is farther from the start than
the image is, by the Mahalanobis distance of the errors that the start is expected to have. So a descent minimises the
misfit plus a share of that distance, which is reduced as the misfit falls (the iteratively regularised Gauss-Newton
method: Bakushinskii, Comput. Math. Math. Phys. 32, 1992).

All victims take their steps together: each evaluation is one batch through the model, with few host synchronisations. A
victim whose misfit no longer falls leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2f_ext.linalg import largest_eigenvalues

EVALUATIONS = 500  # maximum evaluations of the misfit per pass; about 2.5 times the time of the Jacobian
STAGES = 5  # stages of a pass; between them the penalty on the distance to the start is reduced
PULL = 0.1  # the penalty at the expected distance, relative to the misfit at which a stage begins
CHECK_EVERY, GAIN = 50, 0.99  # evaluations between checks of the misfits, and the ratio that counts as a gain
MEMORY = 60  # pairs of steps and changes of the gradient that L-BFGS keeps
DECREASE = 1e-4  # share of the expected decrease that an accepted step has (Armijo)
SHORTEST, LONGEST = 0.1, 0.5  # factors between which a refused step is shortened
STUCK = 1e-8  # step length below which the memory is dropped

# Images [n, p] and which of the victims they are of, int64 [n] -> misfits [n], their slopes [n, p].
SlopesOf = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Expected:
    """Where the images of V victims are expected.

    Attributes:
        centres: [V, p]; directions: [p, q], orthonormal.
        precisions: [V, q, q] float64: the inverse covariance of image - centre along the directions.
    """

    centres: Tensor
    directions: Tensor
    precisions: Tensor

    @staticmethod
    def of_covariances(centres: Tensor, directions: Tensor, covariances: Tensor) -> Expected:
        """The same from the covariances [V, q, q] float64 themselves.

        By Cholesky factors: after `torch.set_num_threads` with more than one thread, MKL's batched LU (torch 2.14's
        `linalg.inv`) reports wrong arguments and does not return.
        """
        return Expected(centres, directions, torch.cholesky_inverse(torch.linalg.cholesky(covariances)))

    def of(self, rows: Tensor) -> Expected:
        """Of these victims alone."""
        return Expected(self.centres[rows], self.directions, self.precisions[rows])

    def distances(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Half the squared Mahalanobis distance of points [V, p] to the centres [V] float64, and its slope [V, p]."""
        offsets = ((points - self.centres) @ self.directions).double()
        pulls = torch.bmm(self.precisions, offsets[:, :, None])[:, :, 0]
        return (offsets * pulls).sum(1) / 2, pulls.to(points.dtype) @ self.directions.T

    def along(self, basis: Tensor) -> Tensor:
        """The precisions along the orthogonal columns of basis [p, q], in its units: [V, q, q]."""
        turned = (self.directions.T @ basis).double()
        return turned.T @ self.precisions @ turned


def annealed_descent(
    slopes_of: SlopesOf,
    expected: Expected,
    points: Tensor,
    grams: Tensor,
    basis: Tensor,
    dampings: Tensor,
    enough: float = 0.0,
) -> Tensor:
    """The points [V, p] after descents with a penalty on the distance to the expected images, reduced by stages.

    Args:
        grams, basis, dampings, enough: see `preconditioned_descent`.
    """
    points, rows, along = points.clone(), torch.arange(len(points), device=points.device), expected.along(basis)
    for _ in range(STAGES):
        losses, _ = slopes_of(points[rows], rows)
        going = losses > enough
        rows, weights = rows[going], PULL * losses[going].double() / (basis.shape[1] / 2)
        if len(rows) == 0:
            break
        pulled = grams[rows] + weights[:, None, None] * along[rows]
        slopes = _pulled(slopes_of, expected.of(rows), rows, weights)
        points[rows] = preconditioned_descent(
            slopes, points[rows], pulled, basis, dampings[rows], enough, EVALUATIONS // STAGES
        )
    return points


def _pulled(slopes_of: SlopesOf, expected: Expected, rows: Tensor, weights: Tensor) -> SlopesOf:
    """Misfits of the victims `rows` [n] plus their distances times `weights` [n]."""

    own = expected

    def with_distances(points: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal own
        if len(places) < len(own.centres):  # victims only ever leave a descent; copies of precisions are large
            own = expected.of(places)
        losses, slopes = slopes_of(points, rows[places])
        distances, pulls = own.distances(points)
        weight = weights[places]
        return losses.double() + weight * distances, slopes + weight[:, None].to(slopes.dtype) * pulls

    return with_distances


def preconditioned_descent(
    slopes_of: SlopesOf,
    points: Tensor,
    grams: Tensor,
    basis: Tensor,
    dampings: Tensor,
    enough: float | Tensor = 0.0,
    evaluations: int = EVALUATIONS,
) -> Tensor:
    """The points [V, p] after steps of L-BFGS (Liu and Nocedal 1989) from points [V, p], along basis [p, q].

    Pixels may leave [0, 1], as far as the misfit lets them. A point is returned as it is if its J^T J is zero, not
    finite or not positive definite with the damping, or if its descent ends at numbers that are not finite.

    Args:
        grams: [V, q, q] float64: J^T J, J = dz along the columns of `basis`.
        dampings: [V] float64, or [1] for all: added to J^T J, relative to its largest eigenvalue.
        enough: misfit below which a descent ends; one for all, or [V].
        evaluations: maximum number of evaluations of the misfit.
    """
    traces = grams.diagonal(dim1=1, dim2=2).sum(1)
    usable = (traces > 0) & traces.isfinite()
    identity = torch.eye(basis.shape[1], dtype=torch.float64, device=points.device)
    grams = torch.where(usable[:, None, None], grams, identity)
    damped = grams + (dampings * largest_eigenvalues(grams))[:, None, None] * identity
    lower, failed = torch.linalg.cholesky_ex(damped)
    usable &= failed == 0
    lower = torch.where(usable[:, None, None], lower, identity)
    # Moves u of the image along rows of L^-1 basis^T have J^T J + damping = identity.
    inverses = torch.linalg.solve_triangular(lower, identity, upper=False).to(basis.dtype)
    limits = torch.as_tensor(enough, dtype=torch.float64, device=points.device).expand(len(points))
    found = _minimised(slopes_of, points, _Directions(inverses, basis), limits, evaluations)
    return torch.where((usable & found.isfinite().all(1))[:, None], found, points)


@dataclass(frozen=True)
class _Memory:
    """The last steps s and changes of the slope y [V, MEMORY, q], the newest last; zeros where there are none yet."""

    steps: Tensor
    changes: Tensor

    def with_pairs(self, step: Tensor, change: Tensor, taken: Tensor) -> _Memory:
        """Add a pair [V, q] to the victims that `taken` [V] names."""
        rows = taken[:, None, None]
        return _Memory(
            torch.where(rows, torch.cat([self.steps[:, 1:], step[:, None]], 1), self.steps),
            torch.where(rows, torch.cat([self.changes[:, 1:], change[:, None]], 1), self.changes),
        )

    def without(self, dropped: Tensor) -> _Memory:
        """Forget all pairs of the victims that `dropped` [V] names."""
        keep = ~dropped[:, None, None]
        return _Memory(self.steps * keep, self.changes * keep)

    def direction(self, slope: Tensor) -> Tensor:
        """- H slope [V, q], by the compact form of the inverse Hessian (Byrd, Nocedal and Schnabel 1994, Eq. 3.1)."""
        products, squares = self.steps @ self.changes.mT, self.changes @ self.changes.mT
        diagonal = products.diagonal(dim1=1, dim2=2)
        upper = products.triu() + torch.diag_embed((diagonal == 0).to(products.dtype))
        newest, length = diagonal[:, -1], squares[:, -1, -1]
        scale = torch.where(newest > 0, newest / length.clamp_min(1e-300), 1.0)[:, None, None]
        along_steps, along_changes = self.steps @ slope[:, :, None], self.changes @ slope[:, :, None]
        inner = torch.linalg.solve_triangular(upper, along_steps, upper=True)
        right = diagonal[:, :, None] * inner + scale * (squares @ inner - along_changes)
        outer = torch.linalg.solve_triangular(upper.mT, right, upper=False)
        found = scale * slope[:, :, None] + self.steps.mT @ outer - scale * (self.changes.mT @ inner)
        return -found[:, :, 0]


@dataclass(frozen=True)
class _Directions:
    """The rows of L^-1 basis^T [q, p] of n victims. Kept as two factors: the second one is the same for all victims.

    Attributes:
        inverses: L^-1 [n, q, q]; basis: [p, q].
    """

    inverses: Tensor
    basis: Tensor

    def of(self, rows: Tensor) -> _Directions:
        """Of these victims alone."""
        return _Directions(self.inverses[rows], self.basis)

    def moved(self, start: Tensor, move: Tensor) -> Tensor:
        """The images [n, p] at moves [n, q] from start [n, p]."""
        return start + torch.bmm(move[:, None].to(start.dtype), self.inverses)[:, 0] @ self.basis.T

    def along(self, slopes: Tensor) -> Tensor:
        """Slopes [n, p] in the image as slopes in the moves, [n, q] float64."""
        # Rows times matrices: matrices times columns take three times as long on a CPU.
        return torch.bmm((slopes @ self.basis)[:, None], self.inverses.mT)[:, 0].double()


@dataclass(frozen=True)
class _State:
    """Where the descents of n victims stand.

    Attributes:
        victim: int64 [n]; start: images [n, p]; directions: along which they move.
        move: [n, q] float64; loss [n] and slope [n, q] there, and the loss at the last look.
        direction, length: of the next trial, [n, q] and [n].
    """

    victim: Tensor
    start: Tensor
    directions: _Directions
    move: Tensor
    loss: Tensor
    slope: Tensor
    mark: Tensor
    memory: _Memory
    direction: Tensor
    length: Tensor

    @staticmethod
    def at(slopes_of: SlopesOf, start: Tensor, directions: _Directions) -> _State:
        """Before the first step, with no memory."""
        victim = torch.arange(len(start), device=start.device)
        move = start.new_zeros(len(start), directions.basis.shape[1], dtype=torch.float64)
        loss, slope = _evaluated(slopes_of, victim, start, directions, move)
        empty = move.new_zeros(len(start), MEMORY, move.shape[1])
        memory, length = _Memory(empty, empty), _first_length(slope)
        return _State(victim, start, directions, move, loss, slope, loss, memory, -slope, length)

    def of(self, rows: Tensor) -> _State:
        """The state of these rows alone, bool [n]."""
        memory = _Memory(self.memory.steps[rows], self.memory.changes[rows])
        parts = {name: part[rows] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return _State(**parts, directions=self.directions.of(rows), memory=memory)

    def images(self) -> Tensor:
        """[n, p]."""
        return self.directions.moved(self.start, self.move)


def _evaluated(
    slopes_of: SlopesOf, victim: Tensor, start: Tensor, directions: _Directions, move: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [n] at moves [n, q] from images [n, p] along n victims' directions, and their slopes [n, q]; float64."""
    losses, slopes = slopes_of(directions.moved(start, move), victim)
    # A copy: a replayed CUDA graph overwrites its results, and float64 losses would not be copied otherwise.
    return losses.to(torch.float64, copy=True), directions.along(slopes)


def _minimised(
    slopes_of: SlopesOf, points: Tensor, directions: _Directions, enough: Tensor, evaluations: int
) -> Tensor:
    """L-BFGS from images [V, p] along their directions, with step lengths by backtracking; the images [V, p].

    Each evaluation is one trial step of every victim. A victim whose misfit no longer falls much, or is below its
    `enough` [V], takes no further steps.
    """
    found, state = points.clone(), _State.at(slopes_of, points, directions)
    for number in range(1, evaluations + 1):
        state = _tried(slopes_of, state)
        if number % CHECK_EVERY == 0:
            going = (state.loss > enough[state.victim]) & (state.loss < GAIN * state.mark)
            if not bool(going.all()):
                found[state.victim] = state.images()
                state = state.of(going)
            if len(state.victim) == 0:
                return found
            state = replace(state, mark=state.loss)
    found[state.victim] = state.images()
    return found


def _tried(slopes_of: SlopesOf, state: _State) -> _State:
    """One trial of each victim: the step is taken where the loss falls enough, else the next one is shorter."""
    loss, slope = state.loss, state.slope
    trial = state.move + state.length[:, None] * state.direction
    trial_loss, trial_slope = _evaluated(slopes_of, state.victim, state.start, state.directions, trial)
    expected = state.length * (slope * state.direction).sum(1)
    accepted = trial_loss <= loss + DECREASE * expected  # False for NaN
    step, change = trial - state.move, trial_slope - slope
    curvature = (step * change).sum(1)
    memory = state.memory.with_pairs(step, change, accepted & (curvature > 1e-10 * change.square().sum(1)))
    shorter = -expected / (2 * (trial_loss - loss - expected)).clamp_min(1e-300)  # minimum of the parabola
    shorter = state.length * shorter.nan_to_num(nan=SHORTEST).clamp(SHORTEST, LONGEST)
    stuck = ~accepted & (shorter < STUCK)
    memory = memory.without(stuck)
    taken = accepted[:, None]
    move, slope = torch.where(taken, trial, state.move), torch.where(taken, trial_slope, slope)
    direction = torch.where((accepted | stuck)[:, None], memory.direction(slope), state.direction)
    length = torch.where(accepted, 1.0, torch.where(stuck, _first_length(slope), shorter))
    loss = torch.where(accepted, trial_loss, loss)
    return replace(state, move=move, loss=loss, slope=slope, memory=memory, direction=direction, length=length)


def _first_length(slope: Tensor) -> Tensor:
    """[V]: a step along - slope [V, q] without a memory is no longer than 1."""
    return (1 / slope.norm(dim=1).clamp_min(1e-300)).clamp_max(1.0)
