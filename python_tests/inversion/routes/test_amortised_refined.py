"""Route `amortised_refined`: from the amortised estimate towards the observed update."""

from dataclasses import replace

from route_cases import posed

from r2f_ext.inversion.counting import rank_limited
from r2f_ext.inversion.routes.amortised import Amortised
from r2f_ext.inversion.routes.amortised_refined import AmortisedRefined


def test_it_starts_at_the_estimate_and_keeps_its_labels() -> None:
    problem, _ = posed()
    start = Amortised().run(problem, lambda units: None)
    problem = replace(problem, found={"amortised": start})
    found = AmortisedRefined().run(problem, lambda units: None)
    assert found.labels is not None and found.labels.tolist() == [2, 2]
    distance = (found.images - start.images).abs().max()
    assert 0 < distance <= 20 * problem.refinement.step_size + 1e-9
    assert AmortisedRefined().units(problem) == 20


def test_its_verdict_counts_the_update() -> None:
    problem, _ = posed()
    assert problem.target is not None
    verdict = AmortisedRefined().verdict(problem)
    layers, tokens = problem.target.layers, problem.effective_tokens
    entries = sum(layer.rank * layer.d_out for layer in layers)
    independent = [rank_limited(tokens[layer.name], layer.d_out, layer.rank) for layer in layers]
    assert verdict.equations == sum(independent) < entries
    assert verdict.unknowns == 768 and "without a guarantee" in verdict.why
