"""Route `amortised`: kernel ridge from proxies, fitted once for all that read it."""

from route_cases import posed, worst_psnr

from r2f_ext.inversion.routes.amortised import Amortised


def test_the_estimate_is_that_of_the_shared_ridge() -> None:
    problem, images = posed()
    told: list[int] = []
    found = Amortised().run(problem, told.append)
    assert problem.proxies is not None and problem.observed is not None
    again = problem.proxies.ridge.invert(problem.observed)
    assert problem.proxies.ridge is problem.proxies.ridge and told == [1]
    assert worst_psnr(found.images, images) > worst_psnr(0 * images + problem.proxies.images.mean(0), images)
    assert (found.images - again.images).abs().max() == 0 and set(found.loo_errors) == {2}
