"""The leak verdict: what is called a leak, what is not, and what each sentence claims."""

import pytest
import torch

from r2f_ext.audit import metrics
from r2f_ext.audit.metrics import CONFIDENCE
from r2f_ext.audit.verdict import (
    NO_PROOF,
    ExactImage,
    LeakVerdict,
    compare,
    conclude,
    judge,
    with_nearer_routes,
)

NEAR = torch.zeros(1, dtype=torch.bool)


def controls(count: int, noise: float = 10.0, strangers: float = 12.0, fixed: float = 12.5, simulated: int = 100):
    """Controls of `count` victims, simulated ones with a spread of 1 dB."""
    drawn = torch.randn(2, count, simulated, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {
        "noise_adapter": noise + drawn[0],
        "same_label_stranger": strangers + drawn[1],
        "class_mean": torch.full((count, 1), fixed, dtype=torch.float64),
        "mean_image": torch.full((count, 1), fixed - 1, dtype=torch.float64),
    }


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_rank_is_among_the_simulated_adapters():
    control = torch.arange(19, dtype=torch.float64)[None]
    assert compare(scores(18.5), control, 0).p_value == pytest.approx(1 / 20)
    assert compare(scores(18.0), control, 0).p_value == pytest.approx(2 / 20)  # a tie counts against the adapter
    assert compare(scores(-1.0), control, 0).p_value == 1
    assert compare(scores(18.5), control, 0).difference_db == pytest.approx(9.5)
    assert compare(scores(18.5), control[:, :1], 0) == compare(scores(18.5), torch.zeros(1, 1), 0)
    assert compare(scores(18.5), control[:, :1], 0).interval_db is None


def test_several_victims_are_ranked_by_their_mean_and_paired():
    control = torch.tensor([[1.0, 4.0, 2.0], [5.0, 4.0, 0.0]], dtype=torch.float64)  # means of sets: 3, 4, 1
    found = compare(scores(3.0, 4.0), control, 0)
    assert found.p_value == pytest.approx(2 / 4) and found.difference_db == pytest.approx(3.5 - 16 / 6)
    low, high = found.interval_db
    paired = [3 - 7 / 3, 4 - 3]  # a resample of two differences is one of them twice, or both
    assert low == pytest.approx(min(paired)) and high == pytest.approx(max(paired))


def test_the_test_keeps_its_level_when_the_victim_is_one_of_the_noise_adapters(monkeypatch):
    """By exchangeability at most 5 % of adapters that are drawn like their controls have p <= 5 %."""
    monkeypatch.setattr(metrics, "RESAMPLES", 2)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2000, 200, generator=generator, dtype=torch.float64)
    called = [compare(one[:1], one[None, 1:], 0).p_value <= 1 - CONFIDENCE for one in drawn]
    assert sum(called) / len(called) <= 0.06


def test_a_clear_leak_and_none():
    found = judge(scores(16.0), controls(1), NEAR, 0)
    assert found.leak is True and found.sentences[0].startswith("The adapter gave away its training image")
    assert found.beyond_control_db == pytest.approx(3.5) and found.p_value <= 0.05
    low, high = found.comparisons["same_label_stranger"].interval_db
    assert low < 16 - float(controls(1)["same_label_stranger"].mean()) < high
    for value in (12.0, 10.0):
        found = judge(scores(value), controls(1), NEAR, 0)
        assert found.leak is False and found.sentences[0].startswith("No leak is shown")


@pytest.mark.parametrize(
    "worse", [{"noise": 15.9}, {"strangers": 15.9}, {"fixed": 16.1}, {"noise": 20.0}, {"strangers": 20.0}]
)
def test_every_control_must_be_beaten(worse):
    found = judge(scores(16.0), controls(1, **worse), NEAR, 0)
    assert found.leak is False
    lost = {"noise": "noise", "strangers": "same label", "fixed": "mean proxy image of its class"}[next(iter(worse))]
    assert lost in found.sentences[0]


def test_a_far_victim_is_never_called_a_leak():
    found = judge(scores(30.0), controls(1), ~NEAR, 0)
    assert found.leak is None and found.sentences[0].startswith("Not judged: the update lies far")
    far = torch.tensor([True, False, False, False])
    some = judge(scores(30.0, 16.0, 16.5, 15.5), controls(4), far, 0)
    assert (
        some.leak is True and "The 3 adapters" in some.sentences[0] and "1 of 4 updates lies far" in some.sentences[-1]
    )
    assert judge(scores(30.0, 10.0, 10.5, 9.5), controls(4), far, 0).leak is False


def test_without_simulated_controls_nothing_is_judged():
    left = {name: one for name, one in controls(1).items() if name != "same_label_stranger"}
    found = judge(scores(16.0), left, NEAR, 0)
    assert found.leak is None and "could not be simulated" in found.sentences[0]


def test_several_victims_of_which_some_are_worse_than_their_controls():
    mixed = judge(scores(20.0, 8.0, 20.0, 8.0), controls(4), NEAR.expand(4), 0)
    assert mixed.leak is False  # the interval over victims holds 0, although the mean is above all controls
    assert mixed.comparisons["class_mean"].interval_db[0] < 0 < mixed.comparisons["class_mean"].difference_db


def test_the_other_adapters_reconstruction_counts_for_several_victims_only():
    other = {"shuffled_adapter": torch.full((2, 1), 19.0, dtype=torch.float64)}
    assert judge(scores(16.0), {**controls(1), "shuffled_adapter": other["shuffled_adapter"][:1]}, NEAR, 0).leak is True
    assert judge(scores(16.0, 16.0), {**controls(2), **other}, NEAR.expand(2), 0).leak is False


def test_the_same_seed_gives_the_same_verdict():
    assert judge(scores(16.0), controls(1), NEAR, 7) == judge(scores(16.0), controls(1), NEAR, 7)


def test_a_route_that_is_not_tested_and_came_much_nearer_is_said_after_the_conclusion():
    verdict = judge(scores(12.0), controls(1), NEAR, 0)
    others = {"amortised": scores(12.0), "gauss_newton": scores(29.8), "matching": scores(14.9)}
    found = with_nearer_routes(verdict, scores(12.0), others, {"gauss_newton": torch.tensor([False])})
    said = "Not part of the test: gauss_newton came nearer, to 29.8 dB, where the judged route has 12.0 dB."
    assert found.sentences == (verdict.sentences[0], said, *verdict.sentences[1:])
    assert found.leak is False
    two = with_nearer_routes(verdict, scores(12.0, 14.0), {"matching": scores(12.0, 20.0)}, {})
    assert "matching came nearer, to 16.0 dB on average, where the judged route has 13.0 dB" in two.sentences[1]


def test_of_exact_images_it_is_not_said_that_they_came_nearer():
    verdict, judged = judge(scores(12.0), controls(1), NEAR, 0), scores(12.0, 14.0, 13.0)

    def said(exact, *found):
        whole = with_nearer_routes(verdict, judged, {"gauss_newton": scores(*found)}, {"gauss_newton": exact})
        return [sentence for sentence in whole.sentences if "came nearer" in sentence]

    assert said(torch.tensor([True] * 3), 99.0, 99.0, 99.0) == []
    assert said(torch.tensor([True, False, False]), 99.0, 14.0, 14.0) == []  # the others are no nearer
    (one,) = said(torch.tensor([True, False, True]), 99.0, 20.0, 99.0)
    assert "gauss_newton came nearer on what is not exact, to 20.0 dB, where the judged route has 14.0 dB." in one


def exact_image(victim: int, bound: float | None = 78.6, exact: bool = True) -> ExactImage:
    return ExactImage("a", victim, "gauss_newton", exact, bound, 0 if exact else None, "exact to 78 dB")


def test_an_exact_image_is_said_first_and_needs_no_private_images():
    unscored = LeakVerdict(None, sentences=("No private images were given.",))
    found = conclude({"a": unscored}, [exact_image(0), exact_image(2, 90.0)])
    assert found.leak is True
    assert found.sentences[0] == "Recovered exactly by gauss_newton: training images 1, 3, to 78 dB or more."
    assert found.sentences[1:] == ("No private images were given.", NO_PROOF)


@pytest.mark.parametrize(
    "one", [exact_image(0, None), exact_image(0, None, exact=False), exact_image(0, 20.0, exact=False)]
)
def test_what_is_not_exact_or_not_bounded_is_not_said_to_be_recovered(one):
    found = conclude({"a": LeakVerdict(None, sentences=("x",))}, [one])
    assert found.leak is None and not any("Recovered exactly" in text for text in found.sentences)
    assert found.sentences[-1] == NO_PROOF


def test_a_report_of_several_sets_names_them_and_leads_with_the_leak():
    sets = {
        "a": LeakVerdict(False, 0.1, (-1.0, 1.0), sentences=("No.",)),
        "b": judge(scores(16.0), controls(1), NEAR, 0),
    }
    found = conclude(sets, [])
    assert found.leak is True and found.beyond_control_db == pytest.approx(3.5)
    assert found.sentences[0] == "a: No." and found.sentences[1].startswith("b: The adapter gave away")
