"""Counts and reasons for refusal that several routes share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from math import prod

from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import ViTGeometry, base_geometry
from r2f_ext.inversion.route import Certainty, Problem, Verdict
from r2f_ext.types import BaseModel


def closed_form_verdict(
    route: str, unknowns: int, equations: int, refusal: str | None, needs: str, count: str
) -> Verdict:
    """The verdict of a linear solve: exact, or refused for the reason given.

    Args:
        refusal: the reason as a clause; None if the solve is exact.
        needs: what must be observed.
        count: unknowns and equations in words.
    """
    certainty = Certainty.EXACT if refusal is None else Certainty.REFUSED
    why = f"{needs}: {count}." if refusal is None else f"Not exact: {refusal} ({count})."
    return Verdict(route, certainty, unknowns, equations, why)


def search_verdict(problem: Problem, route: str, description: str, refusal: str | None = None) -> Verdict:
    """The verdict of a search or an estimate: the observed numbers against the pixel values.

    Args:
        description: a noun phrase that describes the route.
        refusal: why it does not apply, as a clause; None if it applies.
    """
    unknowns = problem.batch * prod(problem.base.input_shape)
    equations, source = _observed_numbers(problem)
    if refusal is not None:
        return Verdict(route, Certainty.REFUSED, unknowns, equations, f"Not run: {refusal}.")
    relation = "suffice for" if equations >= unknowns else "are too few for"
    why = f"{equations} numbers {source} {relation} {unknowns} pixel values; the route is {description}."
    return Verdict(route, Certainty.PLAUSIBLE, unknowns, equations, why)


def _observed_numbers(problem: Problem) -> tuple[int, str]:
    """How many of the observed numbers are independent, layer by layer, and what they are called."""
    tokens, model = problem.effective_tokens, problem.base.model
    if problem.target is not None:
        moved = problem.steps is not None and problem.steps > 1
        total = 0
        for layer in problem.target.layers:
            seen = tokens[layer.name] * problem.batch
            total += rank_limited(seen, layer.d_out, layer.rank)
            total += rank_limited(seen, layer.rank, layer.d_in) if moved and not layer.saved else 0
        saved = " and of saved modules" if any(layer.saved for layer in problem.target.layers) else ""
        return total, f"of the LoRA update{saved}"
    shapes = {f"{name}.weight": model.get_parameter(f"{name}.weight").shape for name in tokens}
    total = sum(
        rank_limited(tokens[name.removesuffix(".weight")] * problem.batch, shape[0], shape[1])
        for name, shape in shapes.items()
        if problem.shared is None or name in problem.shared
    )
    if problem.shared is None:
        return total, "of the exact gradients of the linear layers"
    total += sum(model.get_parameter(name).numel() for name in set(problem.shared) - shapes.keys())
    return total, "of the shared gradients"


def rank_limited(tokens: int, rows: int, columns: int) -> int:
    """Independent numbers in a sum of `tokens` outer products, [rows, columns]: the dimension of the matrices of that
    rank, k (rows + columns - k). With one token it is rows + columns - 1, however many entries the matrix has."""
    rank = min(tokens, rows, columns)
    return rank * (rows + columns - rank)


def several_steps(problem: Problem) -> str | None:
    """Why a search that models one plain SGD step does not apply, as a clause; None if it applies."""
    if problem.training is not None and not problem.training.plain_step:
        return "the victims did not take one plain SGD step, which the search models; gauss_newton_unrolled models more"
    if (problem.steps or 1) > 1 or (problem.adapters and problem.steps is None):
        return (
            "more than one step was taken, or cannot be excluded, and the search models one; "
            "gauss_newton_unrolled models several"
        )
    return None


def doubt(problem: Problem) -> str | None:
    """Why no image of these adapters can be called exact by a route that models SGD, as a clause."""
    dropped = [facts for facts in problem.facts if facts.dropout > 0]
    if dropped:
        return f"'{dropped[0].name}' was trained with dropout, whose random draws are unknown"
    if problem.evidence is not None and problem.evidence.signs_only:
        return "B holds mostly signs of the gradient, as after the first step of Adam, and the search models SGD"
    return None


def where_gradients_are(problem: Problem, verdict: Verdict) -> Verdict:
    """The verdict of a closed form of exact gradients, refused where an adapter was given in their place."""
    if problem.adapters is None or problem.gradients is not None:
        return verdict
    why = "Not run: it needs exact gradients, and an adapter was given."
    return replace(verdict, certainty=Certainty.REFUSED, why=why)


def not_shared(shared: Collection[str] | None, *names: str) -> str | None:
    """Why a route that needs the gradients of `names` does not apply, as a clause; None if all are shared."""
    lacking = [] if shared is None else [name for name in names if name not in shared]
    return f"the gradient of {lacking[0]} is not shared" if lacking else None


def rowspace_refusal(g: ViTGeometry, batch: int) -> str | None:
    """Why block 0's inputs do not give one linear system per patch, regardless of the count; None if they do."""
    if not g.linear_qkv:
        return "block 0 does not read its tokens through a norm and one qkv projection"
    if g.has_embed_norm:
        return "a norm after the patch embedding is not modelled"
    if not g.has_pos_embed:
        return "without a position embedding every patch solves every position's equations"
    if batch > 1:
        # The difference of two images at any position solves the homogeneous equations of all positions.
        free = min((batch - 1) * g.patch_tokens, g.patch_numbers + g.norm_scales)
        return f"the differences between {batch} images leave {free} directions of every patch free"
    return None


def count_on(route: str, base: BaseModel, count: Callable[[ViTGeometry], Verdict]) -> Verdict:
    """Apply `count` to the base's geometry; a base that is not a supported Vision Transformer is refused."""
    try:
        geometry = base_geometry(base)
    except R2FError as error:
        return Verdict(route, Certainty.REFUSED, 0, 0, str(error))
    return count(geometry)
