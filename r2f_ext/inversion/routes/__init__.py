"""The registry of routes: every `Route` subclass defined in a module of this package is registered automatically."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from r2f_ext.discovery import classes_in
from r2f_ext.errors import R2FError, expected
from r2f_ext.gpu import float32_products
from r2f_ext.inversion.route import Certainty, Problem, Route, Verdict
from r2f_ext.progress import Stages
from r2f_ext.types import Reconstruction

FIELD_NAMES = {
    "gradients": "exact gradients",
    "adapters": "an adapter",
    "observed": "an adapter's update",
    "a": "the A that the proxies start from",
    "initial": "an adapter",
    "training": "the victim's training recipe (r2f pairs --steps, --optimizer, ...)",
    "proxies": "proxy pairs",
    "public": "public images that the proxy pairs leave unused",
    "decoded": "decoded gradients (r2f decode, --gradients)",
}
LACKING = "Not run: it needs "  # before what a problem lacks
FAILED = "Failed: "  # before the reason


@dataclass(frozen=True)
class Outcome:
    """The results of the routes on one problem.

    Attributes:
        reconstructions: one per route that ran, in the order in which they ran.
        not_run: requested routes that did not run, or that failed -> the reason, one sentence.
        error: of the last route that failed.
    """

    reconstructions: list[Reconstruction]
    not_run: dict[str, str]
    error: Exception | None = None

    def found(self) -> list[Reconstruction]:
        """The reconstructions; raises `error` where a route failed and none succeeded."""
        if self.error is not None and not self.reconstructions:
            raise self.error
        return self.reconstructions


def registry() -> dict[str, Route]:
    """Name -> route, sorted by name, but each route after those in its `after`."""
    return _in_order({each.name: each() for each in classes_in(__name__, Route)})  # type: ignore[type-abstract]


def default_routes() -> tuple[str, ...]:
    """Names of the routes that run if none are named."""
    return tuple(name for name, route in registry().items() if route.by_default)


def verdicts_of(problem: Problem) -> dict[str, Verdict]:
    """Route -> verdict, of every route in the registry."""
    return {name: route.verdict(problem) for name, route in registry().items()}


def refusals(problem: Problem, verdicts: dict[str, Verdict], later: Sequence[str] = ()) -> dict[str, str]:
    """Route -> why it cannot run on this problem, of all routes that cannot; `later`: fields still to be filled in."""
    reasons = {name: _refusal(route, verdicts[name], problem, later) for name, route in registry().items()}
    return {name: why for name, why in reasons.items() if why is not None}


def check_runnable(
    problem: Problem, verdicts: dict[str, Verdict], names: Sequence[str], later: Sequence[str] = ()
) -> None:
    """Refuse a choice of routes of which none can run, before any time is spent.

    Args:
        later: fields of the problem that are filled in before the routes run.

    Raises:
        R2FError: no name, a name that is not in the registry, or no route of the choice can run; the sentence says why.
    """
    chosen = with_earlier(names, verdicts)
    refused = {name: why for name, why in refusals(problem, verdicts, later).items() if name in chosen}
    if len(refused) == len(chosen):
        listed = " ".join(f"{name}: {why}" for name, why in refused.items()) or "name at least one."
        raise R2FError(f"none of the chosen routes can run. {listed}")


@float32_products()
def run_routes(
    problem: Problem, verdicts: dict[str, Verdict], names: Sequence[str] | None = None, stages: Stages | None = None
) -> Outcome:
    """Run the chosen routes that no verdict refuses. A route that fails does not keep the others from running.

    Args:
        verdicts: of all routes on this problem, from `verdicts_of`.
        names: routes to run, which also runs those in their `after`; None: the default ones.
        stages: times each route under its name.

    Raises:
        R2FError: a name is not in the registry.
    """
    stages, routes = stages or Stages(), registry()
    outcome = Outcome([], {})
    for name in with_earlier(default_routes() if names is None else names, verdicts):
        route, verdict = routes[name], verdicts[name]
        refusal = _refusal(route, verdict, problem) or _missing_start(route, problem)
        if refusal is not None:
            outcome.not_run[name] = refusal
            continue
        try:
            with stages.stage(name, route.units(problem)) as advance:
                found = route.run(problem, advance)
        except Exception as error:
            outcome.not_run[name] = f"{FAILED}{expected(error)}"
            outcome = replace(outcome, error=error)
            continue
        outcome.reconstructions.append(found)
        problem = replace(problem, found={**problem.found, name: found})
    return outcome


def any_failed(not_run: Mapping[str, str]) -> bool:
    """Whether a route began and failed, by the reasons that `run_routes` gave."""
    return any(why.startswith(FAILED) for why in not_run.values())


def _refusal(route: Route, verdict: Verdict, problem: Problem, later: Sequence[str] = ()) -> str | None:
    """Why the problem itself keeps a route from running; `later`: fields that are still to be filled in."""
    if verdict.certainty is Certainty.REFUSED:
        return verdict.why
    field_name = route.lacking(problem, later)
    return None if field_name is None else f"{LACKING}{FIELD_NAMES.get(field_name, field_name)}."


def _missing_start(route: Route, problem: Problem) -> str | None:
    """A sentence that no route ran from which this one can start; None if one did, or none is needed."""
    if not route.after or any(name in problem.found for name in route.after):
        return None
    earlier = route.after[-1]
    return f"Not run: it starts from what {earlier} finds, and {earlier} did not run."


def needs(field_name: str, names: Iterable[str], verdicts: dict[str, Verdict]) -> bool:
    """Whether one of the routes that run for a choice reads this field of the problem.

    Raises:
        R2FError: a name is not in the registry.
    """
    return any(field_name in registry()[name].reads for name in with_earlier(names, verdicts))


def with_earlier(names: Iterable[str], verdicts: dict[str, Verdict]) -> list[str]:
    """The named routes and, unless a route is refused, the routes that it depends on; in the registry's order.

    Raises:
        R2FError: a name is not in the registry.
    """
    routes = registry()
    chosen: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in routes:
            raise R2FError(f"there is no route '{name}': name some of {', '.join(routes)}.")
        if name not in chosen:
            chosen.add(name)
            left += () if verdicts[name].certainty is Certainty.REFUSED else routes[name].after
    return [name for name in routes if name in chosen]


def _in_order(routes: dict[str, Route]) -> dict[str, Route]:
    ordered: dict[str, Route] = {}

    def add(name: str) -> None:
        for earlier in routes[name].after:
            add(earlier)
        ordered[name] = routes[name]

    for name in sorted(routes):
        add(name)
    return ordered
