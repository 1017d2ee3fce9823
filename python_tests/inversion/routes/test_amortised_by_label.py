"""Route `amortised_by_label`: every public image of a victim's label, in memory for one label at a time."""

from dataclasses import replace

import pytest

from r2f_ext.data import load_images
from r2f_ext.errors import R2FError
from r2f_ext.inversion import label_by_label
from r2f_ext.inversion.route import Certainty, Public
from r2f_ext.inversion.routes import run_routes, verdicts_of
from r2f_ext.inversion.routes.amortised_by_label import AmortisedByLabel
from r2f_ext.progress import no_progress


def test_pairs_are_made_of_the_victims_labels_alone(labelled) -> None:
    told = []
    route = AmortisedByLabel()
    found = route.run(labelled, told.append)
    assert sum(told) == route.units(labelled) == 360  # two labels of 180 images
    assert found.route == route.name and found.labels.tolist() == [3, 1, 3] and set(found.loo_errors) == {1, 3}
    assert round(found.details["pairs_a_victim"]) == 180 and "as many as fit" not in found.why


def test_no_more_pairs_are_held_than_fit(labelled, monkeypatch) -> None:
    held = []
    made = label_by_label.AmortisedInverter
    monkeypatch.setattr(label_by_label, "AmortisedInverter", lambda *args: held.append(len(args[1])) or made(*args))
    cut = replace(labelled, public=replace(labelled.public, most=120))
    found = AmortisedByLabel().run(cut, no_progress)
    assert held == [120, 120] and AmortisedByLabel().units(cut) == 240
    assert found.why.endswith("of its images no more than 120 were used, as many as fit into memory")


def test_labels_drawn_at_random_serve_every_label(labelled) -> None:
    public = load_images("procedural", input_shape=(3, 16, 16), num_classes=5, count=150)
    found = AmortisedByLabel().run(replace(labelled, public=Public(public)), no_progress)
    assert round(found.details["pairs_a_victim"]) == 150 and found.labels.tolist() == [3, 1, 3]


def test_without_images_beyond_the_pairs_it_says_so(labelled) -> None:
    assert AmortisedByLabel().verdict(labelled).certainty is Certainty.PLAUSIBLE
    without = replace(labelled, public=None)
    outcome = run_routes(without, verdicts_of(without), ["amortised_by_label"])
    sentence = "Not run: it needs public images that the proxy pairs leave unused."
    assert outcome.not_run["amortised_by_label"] == sentence


def test_memory_for_hardly_any_pair_fails_with_a_sentence(labelled) -> None:
    cut = replace(labelled, public=replace(labelled.public, most=5))
    with pytest.raises(R2FError, match="pairs of only 5 images of a label fit into memory"):
        AmortisedByLabel().run(cut, no_progress)
