"""Route `gauss_newton_unrolled`: the search of `gauss_newton` through the victim's whole training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import Tensor

from r2f_ext.errors import R2FError
from r2f_ext.inversion.adamw_step import first_adamw_step, reads_adamw
from r2f_ext.inversion.counting import doubt, search_verdict
from r2f_ext.inversion.exactness import Bound
from r2f_ext.inversion.gauss_newton import process_bytes
from r2f_ext.inversion.newton import Search
from r2f_ext.inversion.route import Problem, Route, Verdict
from r2f_ext.inversion.saved_searches import files_of
from r2f_ext.inversion.searches import one_by_one, search_each
from r2f_ext.inversion.start import remarked, search_start
from r2f_ext.inversion.unrolled_search import UnrolledSearch
from r2f_ext.inversion.update_map import MAX_PIXELS, too_large
from r2f_ext.pairs import Training
from r2f_ext.progress import Advance
from r2f_ext.types import LoraUpdate, Reconstruction


class GaussNewtonUnrolled(Route):
    """See `inversion/unrolled_search.py`: several steps or AdamW, of a known recipe, on one image."""

    name = "gauss_newton_unrolled"
    threat_model = (
        "Whoever knows the base, its head, the full recipe of a training on one image, and (but for a single step of "
        "AdamW) A before it can run it."
    )
    reads = ("target", "adapters", "initial", "training", "proxies")
    after = ("amortised",)
    by_default = False

    def verdict(self, problem: Problem) -> Verdict:
        description = "a search through the known training that ends exactly only from a start close enough"
        return search_verdict(problem, self.name, description, _refusal(problem))

    def run(self, problem: Problem, advance: Advance) -> Reconstruction:
        training, begun = problem.training, search_start(problem, self.after)
        assert problem.target is not None and problem.adapters is not None and training is not None
        adapters, a0 = problem.adapters, _a0(problem)
        start, subspace, config = begun.estimate, begun.subspace, problem.gauss_newton
        searches = UnrolledSearch(problem.target, a0, training, subspace, config)

        def find(victim: int, image: Tensor, label: Tensor) -> Search:
            errors = start.loo_errors.get(int(label))
            return searches.find(adapters[victim].a, adapters[victim].b, image, label, errors)

        def bound(victim: int, image: Tensor, label: Tensor) -> Bound:
            return searches.bound(adapters[victim].a, adapters[victim].b, image, label)

        factors = [{f"{name}.{side}": t for side in "ab" for name, t in getattr(one, side).items()} for one in adapters]
        settings = config, training
        files = files_of(problem.saved, self.name, settings, problem.target, a0, factors, start.labels)
        numbers = sum((layer.d_out + layer.d_in) * layer.rank for layer in problem.target.layers)
        memory = process_bytes(searches.subspace, searches.positions, numbers)
        why = _doubt(problem, training)
        found = search_each(self.name, start, one_by_one(find), bound, advance, why, files, memory)
        return remarked(found, begun.remark)


def _doubt(problem: Problem, training: Training) -> str | None:
    """See `doubt`. That B holds mostly signs is no reason for doubt here if AdamW itself is modelled."""
    return doubt(replace(problem, evidence=None) if training.optimizer == "adamw" else problem)


def _refusal(problem: Problem) -> str | None:
    pixels, training = prod(problem.base.input_shape), problem.training
    if pixels > MAX_PIXELS:
        return too_large(pixels)
    if training is None:
        return "the victims' training recipe is not known (r2f pairs --steps, ...)" if problem.adapters else None
    if training.plain_step:
        return "the victims took one plain SGD step, which gauss_newton models"
    if training.dropout:
        return "the random draws of the victims' dropout are unknown"
    if problem.target is not None and any(layer.saved for layer in problem.target.layers):
        return "whole modules were trained too, and the training that is modelled moves LoRA factors alone"
    if any(one.b0 for one in problem.adapters or ()):
        return "B did not start at 0, as it does in the training that is modelled"
    if training.owned > 1:
        return f"no route gives a start for each of the {training.owned} images of a victim"
    if reads_adamw(training):
        return _unreadable(problem.adapters or (), training)
    if problem.initial is not None and problem.initial.found is None:
        return "A before the first step is unknown; pass --initial FOLDER or --a0-seed N"
    return None


def _a0(problem: Problem) -> dict[str, Tensor]:
    """A before the first step, or the adapters' own where that is unknown: AdamW's first step only lets A decay, by one
    factor, which cancels."""
    assert problem.initial is not None and problem.a is not None
    return problem.a if problem.initial.found is None else problem.initial.found.a


def _unreadable(adapters: Sequence[LoraUpdate], training: Training) -> str | None:
    """Why AdamW's first step cannot be read from one of the adapters."""
    for place, adapter in enumerate(adapters, 1):
        try:
            first_adamw_step(adapter.b, training)
        except R2FError as error:
            return f"of adapter {place}, {str(error).rstrip('.')}"
    return None
