"""Route `gauss_newton_unrolled`: images of victims that trained otherwise, by a known recipe."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from route_cases import posed, worst_psnr

from r2f_ext.inversion import searches
from r2f_ext.inversion.exactness import exactness_of
from r2f_ext.inversion.route import Certainty
from r2f_ext.inversion.routes import run_routes, verdicts_of
from r2f_ext.inversion.routes.gauss_newton_unrolled import GaussNewtonUnrolled
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.pairs import Training
from r2f_ext.progress import no_progress


@pytest.mark.parametrize(
    "training",
    [Training(steps=2, lr=0.02), Training(optimizer="adamw", lr=1e-3)],
    ids=["two steps", "the first step of AdamW"],
)
def test_finds_the_images_from_the_amortised_start(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, images = posed(training)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(searches, "processes_for", lambda *given: asked.append(given) or 1)
    problem = replace(problem, gauss_newton=GaussNewtonConfig(directions=12))
    if training.optimizer == "adamw":  # its signs make a poor start: this one is near
        start = run_routes(posed()[0], verdicts_of(problem), ["amortised"]).reconstructions[0]
        unknown = SimpleNamespace(found=None, named=False)  # A before the step is not needed
        problem = replace(problem, found={"amortised": start}, initial=unknown)
        found = GaussNewtonUnrolled().run(problem, no_progress)
    else:
        found = run_routes(problem, verdicts_of(problem), ["gauss_newton_unrolled"]).reconstructions[-1]
    assert found.route == "gauss_newton_unrolled" and found.per_victim["exact"].tolist() == [0, 0]
    assert found.per_victim["free_directions"].min() >= 384  # patches of 48 numbers are embedded in 24
    assert exactness_of(found, 0).words.startswith("determined up to ")
    assert worst_psnr(found.images, images) > 60
    ((victims, memory),) = asked  # processes may share them
    assert victims == 2 and memory > 0


def test_refusals_say_why() -> None:
    problem, _ = posed()
    route, two = GaussNewtonUnrolled(), Training(steps=2)
    known = replace(problem, training=two, steps=2)
    assert route.verdict(known).certainty is Certainty.PLAUSIBLE
    for other, words in (
        (replace(problem, training=Training()), "which gauss_newton models"),
        (replace(known, training=replace(two, dropout=0.1)), "dropout"),
        (replace(known, training=replace(two, samples=2)), "each of the 2 images"),
        (replace(known, adapters=[replace(one, b0=one.b) for one in known.adapters]), "B did not start at 0"),
        (replace(known, initial=SimpleNamespace(found=None, named=False)), "pass --initial FOLDER or --a0-seed N"),
        (replace(known, base=replace(known.base, input_shape=(3, 224, 224))), "150528 numbers"),
    ):
        verdict = route.verdict(other)
        assert verdict.certainty is Certainty.REFUSED and words in verdict.why


def test_what_adamws_first_step_does_not_show_is_said_before_the_run() -> None:
    problem, _ = posed(Training(optimizer="adamw", lr=1e-3))
    route = GaussNewtonUnrolled()
    assert route.verdict(problem).certainty is Certainty.PLAUSIBLE
    one, two = problem.adapters
    half = replace(two, b={name: each.bfloat16().float() for name, each in two.b.items()})
    signs = replace(two, b={name: 1e-3 * each.sign().float() * 0.999 for name, each in two.b.items()})
    for other, words in (
        (half, "of adapter 2, B of blocks.0.attn.qkv has half precision"),
        (signs, "of adapter 2, B's"),
    ):
        verdict = route.verdict(replace(problem, adapters=[one, other]))
        assert verdict.certainty is Certainty.REFUSED and words in verdict.why
    slower = replace(problem, training=replace(problem.training, lr=2e-3))
    assert "pass the victim's own" in route.verdict(slower).why
