"""Route `gauss_newton`: exact images of one-step adapters, and what it refuses."""

from dataclasses import replace

from route_cases import posed, worst_psnr

from r2f_ext.data import ImageSet
from r2f_ext.inversion.counting import doubt
from r2f_ext.inversion.route import Certainty, Public
from r2f_ext.inversion.routes import run_routes, verdicts_of
from r2f_ext.inversion.routes.gauss_newton import GaussNewton
from r2f_ext.inversion.routes.gauss_newton_matrix_free import GaussNewtonMatrixFree
from r2f_ext.models import AdapterFacts
from r2f_ext.pairs import Training
from r2f_ext.progress import no_progress


def test_finds_the_images_from_the_amortised_start() -> None:
    problem, images = posed()
    outcome = run_routes(problem, verdicts_of(problem), ["gauss_newton"])
    start, found = outcome.reconstructions
    assert [start.route, found.route] == ["amortised", "gauss_newton"]
    # The base embeds patches of 48 numbers in 24, so half of every patch is free: right within the proxies' variation,
    # but not known to be.
    assert found.per_victim["exact"].tolist() == [0, 0] and found.details["exact"] == 0
    assert found.per_victim["free_directions"].min() >= 384
    assert worst_psnr(found.images, images) > max(60, worst_psnr(start.images, images))


def test_refusals_name_the_route_that_serves() -> None:
    problem, _ = posed()
    route = GaussNewton()
    assert route.verdict(problem).certainty is Certainty.PLAUSIBLE
    large = replace(problem, base=replace(problem.base, input_shape=(3, 224, 224)))
    for other, words in (
        (large, "150528 numbers, and the search, which is dense, takes up to 4096; gauss_newton_matrix_free"),
        (replace(problem, steps=None), "more than one step was taken"),
        (replace(problem, steps=2), "gauss_newton_unrolled models several"),
        (replace(problem, training=Training(optimizer="adamw")), "did not take one plain SGD step"),
    ):
        verdict = route.verdict(other)
        assert verdict.certainty is Certainty.REFUSED and not verdict.identifiable and words in verdict.why


def test_public_images_and_an_estimate_serve_without_proxies() -> None:
    """As in the demo, which has the labels of an earlier audit."""
    problem, images = posed()
    route, proxies = GaussNewton(), problem.proxies
    assert proxies is not None
    bare = replace(problem, proxies=None)
    assert route.lacking(bare) == "proxies" and route.lacking(bare, later=("proxies",)) is None
    outcome = run_routes(bare, verdicts_of(bare), ["gauss_newton"])
    assert outcome.reconstructions == [] and "it needs proxy pairs" in outcome.not_run["gauss_newton"]
    start = proxies.ridge.invert(problem.observed)
    public = ImageSet("some", (255 * proxies.images).round().byte(), proxies.labels)
    given = replace(bare, public=Public(public), found={"amortised": start})
    assert route.lacking(given) is None is GaussNewtonMatrixFree().lacking(given)
    found = route.run(given, no_progress)
    # Public images are bytes: the space that they span lies beside the images by their rounding.
    assert found.route == "gauss_newton" and worst_psnr(found.images, images) > worst_psnr(start.images, images) + 10


def test_dropout_and_signs_cast_doubt_on_every_image() -> None:
    problem, _ = posed()
    assert problem.evidence is not None and doubt(problem) is None
    dropped = replace(problem, facts=(AdapterFacts("a", dropout=0.1),))
    signs = replace(problem, evidence=replace(problem.evidence, signs_only=True))
    assert "dropout" in (doubt(dropped) or "") and "signs of the gradient" in (doubt(signs) or "")
