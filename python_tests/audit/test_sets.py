"""Whole verdicts: adapters of noise are not leaks, real victims are, and foreign data are not judged."""

from dataclasses import replace

import pytest
import torch

from r2f_ext.audit.base_check import BaseCheck
from r2f_ext.audit.controls import noise_updates
from r2f_ext.audit.run import run_audit_stages
from r2f_ext.audit.sets import set_report
from r2f_ext.audit.verdict import ANOTHER_BASE, UNSCORED
from r2f_ext.config import AuditConfig
from r2f_ext.data import load_images
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.route import adapter_problem
from r2f_ext.pairs import GeneratedPairs

NOISE, VICTIMS = 40, 12
STEPS = MatchingConfig(steps=1)
CONFIG = AuditConfig(
    pairs=400, decoder_pairs=40, held_out=10, routes=("amortised",), matching=STEPS, refinement=STEPS, seed=2
)


@pytest.fixture(scope="module")
def judged(audited):
    """One audit of noise, clothes and faces together: (result, proxy, sets of private images with their rows)."""
    target, proxy = audited.target, load_images("embedded", count=400)
    clothes = load_images("embedded", role="private", count=VICTIMS)
    faces = load_images("lfw", role="private", count=VICTIMS)
    problem = adapter_problem(target, audited.adapters)
    observed = {name: [] for name in target.names}
    for images in (clothes, faces):
        for batch in GeneratedPairs(target, problem.a, images).batches():
            for name, update in batch.updates.items():
                observed[name].append(update)
    (noise,) = noise_updates({n: parts[0] for n, parts in observed.items()}, NOISE, seed=9)
    stacked = {n: torch.cat([noise[n], *parts]) for n, parts in observed.items()}
    adapters = [audited.adapters[0]] * (NOISE + 2 * VICTIMS)
    problem = replace(problem, observed=stacked, adapters=adapters)
    result = run_audit_stages(problem, proxy, CONFIG, labels=clothes.labels)
    return result, proxy, clothes, faces


def leaks(judged, private, first, count, far=True):
    """The verdicts of `count` adapters from `first` on, each with an image of its own."""
    result, proxy, *_ = judged
    if not far:
        result = replace(result, estimates=replace(result.estimates, far=torch.zeros_like(result.estimates.far)))
    return [
        set_report(
            "x", result, proxy, private.take(torch.tensor([i % VICTIMS])), slice(first + i, first + i + 1)
        ).judgement.leak
        for i in range(count)
    ]


@pytest.mark.parametrize("far", [True, False])
def test_noise_is_not_called_a_leak(judged, far):
    """Neither with the rule that far updates are not judged, nor by the test alone: 5 % of 40 are 2."""
    assert sum(one is True for one in leaks(judged, judged[2], 0, NOISE, far)) <= 2


def test_most_real_victims_are_called_a_leak(judged):
    assert sum(one is True for one in leaks(judged, judged[2], NOISE, VICTIMS)) >= VICTIMS // 2


def test_faces_are_not_judged_by_clothes(judged):
    assert leaks(judged, judged[3], NOISE + VICTIMS, VICTIMS).count(None) >= VICTIMS - 1


def test_sets_are_judged_as_wholes(judged):
    result, proxy, clothes, _ = judged
    whole = set_report("x", result, proxy, replace(clothes, in_order=True), slice(NOISE, NOISE + VICTIMS)).judgement
    assert whole.leak is True and whole.interval_db[0] > 0 and "shuffled_adapter" in whole.comparisons
    near = replace(result, estimates=replace(result.estimates, far=torch.zeros_like(result.estimates.far)))
    for first in range(0, NOISE - VICTIMS, VICTIMS):
        for ordered in (True, False):  # matched to its best images, noise is still noise
            private = replace(clothes, in_order=ordered)
            assert set_report("x", near, proxy, private, slice(first, first + VICTIMS)).judgement.leak is False


def test_another_order_of_the_private_images_gives_the_same_verdict(judged):
    result, proxy, clothes, _ = judged
    turned = clothes.take(torch.arange(VICTIMS).roll(5))
    rows = slice(NOISE, NOISE + VICTIMS)
    one, other = (set_report("x", result, proxy, images, rows) for images in (clothes, turned))
    assert torch.equal(one.originals, other.originals) and one.judgement.leak is other.judgement.leak is True
    assert "matched" in one.pairing


def test_images_without_labels_have_strangers_of_the_found_label_and_no_class_mean(judged):
    result, proxy, clothes, _ = judged
    unlabelled = replace(clothes.take(torch.tensor([0])), labels_known=False)
    part = set_report("x", result, proxy, unlabelled, slice(NOISE, NOISE + 1))
    assert part.labels is None and "class_mean" not in part.figures.controls
    assert "same_label_stranger" in part.judgement.comparisons and part.judgement.leak is True
    assert any("have no labels" in note for note in part.notes)


def test_updates_of_another_base_stand_behind_a_leak_and_before_all_else(judged):
    """What was recovered is said first; where nothing was, that the base is another one."""
    result, proxy, clothes, _ = judged
    count, few = len(result.problem.adapters), slice(NOISE, NOISE + 6)

    def of(foreign, private):
        fits = tuple(False if NOISE <= i < NOISE + foreign else None for i in range(count))
        check = BaseCheck("proj", (), 0.0, fits, ("Some cannot come from this base.",) if foreign else ())
        return set_report("x", replace(result, base_check=check), proxy, private, few).judgement

    private = clothes.take(torch.arange(6))
    leak = of(1, private)
    assert leak.leak is True and leak.sentences[0].startswith("The 4 adapters gave away")
    assert leak.sentences[1] == "Some cannot come from this base." and leak.sentences[-1].startswith(
        "Left out: 1 of 6"
    )  # and one is far
    assert of(6, private).sentences == ("Some cannot come from this base.", ANOTHER_BASE)
    assert of(6, None).sentences == ("Some cannot come from this base.", ANOTHER_BASE)
    assert of(1, None).sentences == ("Some cannot come from this base.", UNSCORED)
    assert of(0, None).sentences == (UNSCORED,)


def test_images_that_came_nearer_by_a_route_that_is_not_tested_are_mentioned(judged):
    result, proxy, clothes, _ = judged
    blank = torch.full_like(result.estimates.images, 0.5)
    blank[NOISE : NOISE + 2] = (clothes.batch(slice(0, 2)) + 0.01).clamp(0, 1)
    searched = replace(result.reconstructions[0], route="gauss_newton", images=blank)
    result = replace(result, reconstructions=[*result.reconstructions, searched])
    found, other = (
        set_report("x", result, proxy, clothes.take(torch.arange(2)), slice(first, first + 2)).judgement
        for first in (NOISE, 0)
    )
    assert found.sentences[1].startswith("Not part of the test: gauss_newton came nearer, to 4")
    assert not any("came nearer" in sentence for sentence in other.sentences)  # gray images are not near


def test_a_class_without_proxies_is_said(judged):
    result, proxy, clothes, _ = judged
    label = int(clothes.labels[0])
    without = proxy.take(torch.nonzero(proxy.labels != label).flatten())
    part = set_report("x", result, without, clothes.take(torch.tensor([0])), slice(NOISE, NOISE + 1))
    assert "class_mean" not in part.figures.controls
    assert any(f"no image of class {label}: there is no class mean" in note for note in part.notes)
