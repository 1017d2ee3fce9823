"""Route `amortised_nearby`: a second estimate, which a search then starts from."""

from dataclasses import replace

from r2f_ext.data import ProceduralStream
from r2f_ext.inversion.route import Certainty
from r2f_ext.inversion.routes import run_routes, verdicts_of
from r2f_ext.inversion.routes.amortised_nearby import AmortisedNearby
from r2f_ext.inversion.routes.gauss_newton import GaussNewton
from r2f_ext.inversion.start import best_estimate


def run(posed):
    return run_routes(posed, verdicts_of(posed), ["amortised_nearby"]).found()


def test_it_follows_the_first_estimate_and_searches_start_from_it(labelled):
    first, second = run(labelled)
    assert (first.route, second.route) == ("amortised_by_label", "amortised_nearby")
    assert second.labels.tolist() == [3, 1, 3] and set(second.loo_errors) == {1, 3}
    both = replace(labelled, found={**labelled.found, first.route: first, second.route: second})
    assert best_estimate(both, GaussNewton.after) is second
    # `amortised` counts the pairs of all labels where few have the victim's.
    crowded = replace(both.found["amortised"], details={"pairs_a_victim": 1e6})
    more = replace(both, found={**both.found, "amortised": crowded})
    assert best_estimate(more, GaussNewton.after) is second


def test_all_units_are_reported(labelled):
    (first, _), told, route = run(labelled), [], AmortisedNearby()
    for generated in (None, ProceduralStream(70, (3, 16, 16), 5)):
        posed = replace(
            labelled,
            found={first.route: first},
            public=replace(labelled.public, generated=generated),
        )
        told.clear()
        found = route.run(posed, told.append)
        assert sum(told) == route.units(posed) == (18 * 360 if generated is None else 70)
        assert found.details.keys() == {"near_pairs"}


def test_without_images_beyond_the_pairs_it_says_so(labelled):
    assert AmortisedNearby().verdict(labelled).certainty is Certainty.PLAUSIBLE
    without = replace(labelled, public=None)
    outcome = run_routes(without, verdicts_of(without), ["amortised_nearby"])
    assert outcome.not_run["amortised_nearby"] == "Not run: it needs public images that the proxy pairs leave unused."
