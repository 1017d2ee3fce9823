import math

import pytest
import torch

from r2f_ext.pairs import Training
from r2f_ext.studies import CLOTHES, Table, World
from r2f_ext.studies.questions.steps import (
    AS_FEW,
    FRESH,
    ONE,
    ONE_STEP,
    OWN_RECIPE,
    Steps,
    _psnr,
    owned_by,
    training_of,
)
from r2f_ext.studies.scene import base_of, private_images


def cell(metric, values, **keys):
    return {"setting": keys, "seed": 0, "measured": [{"metric": metric, "values": values, "labels": {}}]}


def of(optimizer="sgd", images=ONE, fitted=ONE_STEP, **keys):
    return {"optimizer": optimizer, "images": images, "fitted": fitted, **keys}


def test_a_setting_names_the_training():
    assert training_of({"optimizer": "sgd", "images": FRESH, "T": 5}) == Training(5, samples=5, lr=0.1)
    assert training_of({"optimizer": "adamw", "images": ONE, "T": 5}) == Training(
        5, samples=1, optimizer="adamw", lr=1e-3
    )


def test_every_quick_setting_is_among_the_full_ones_or_shorter():
    study = Steps()
    full, quick = study.settings(World()), study.settings(World(quick=True))
    assert len({str(each) for each in full}) == len(full)
    assert {str(each) for each in quick} <= {str(each) for each in full}


@pytest.mark.parametrize("leaks", [True, False])
def test_conclusions_follow_the_table(leaks):
    near, far = ([20.0, 21.0], [12.0, 13.0])
    table = Table.of(
        [
            cell("cosine", [0.95, 0.96], decoder="ridge", **of(T=1)),
            cell("cosine", [0.80, 0.90] if leaks else [0.6, 0.9], decoder="ridge", **of(T=50)),
            cell("cosine", [0.70, 0.75], decoder="class_mean_gradient", **of(T=50)),
            cell("above_stranger_db", [1.0, 2.0] if leaks else [-1.0, 2.0], route="amortised", **of(T=50)),
            cell("cosine", [0.9, 0.91] if leaks else [0.5, 0.6], decoder="ridge", **of(fitted=OWN_RECIPE, T=10)),
            cell("cosine", [0.6, 0.61], decoder="ridge", **of(fitted=AS_FEW, T=10)),
            cell("psnr_db", near if leaks else far, route="adapter_rowspace", optimizer="sgd", stored="float64", T=10),
            cell("psnr_db", far, route="mean_image", optimizer="sgd", stored="float64", T=10),
        ]
    )
    said = " ".join(Steps().conclude(World(), table))
    assert ("at no T is the amortised estimate" in said) is not leaks
    assert ("clearly nearer to the image than a stranger's at T = 50 of 50; at T = 50 by 1.5 " in said) is leaks
    assert ("is not clearly better than one of as many one-step pairs" in said) is not leaks
    assert ("nowhere clearly above the mean image" in said) is not leaks
    assert "at T = 1 and" in said


def test_conclusions_of_tables_with_holes():
    assert Steps().conclude(World(), Table([])) == []
    single = Table.of([cell("cosine", [0.9], decoder="ridge", **of(T=1))])
    assert Steps().conclude(World(), single) == [
        "SGD on one image: the ridge's cosine to the average gradient is 0.900 at T = 1."
    ]


def test_a_victim_owns_its_private_image_and_further_ones_of_its_own():
    base = base_of("embedded", World().device)
    private, further = private_images(base, CLOTHES, 0, 2), private_images(base, CLOTHES, 1, 8)
    found = owned_by(private, further, 3)
    assert torch.equal(found.images[[0, 3]], private.images)
    assert torch.equal(found.images[[1, 2, 4, 5]], further.images[:4])
    assert torch.equal(owned_by(private, further, 1).images, private.images)


def test_gains_are_over_the_same_victims_stranger():
    originals = torch.zeros(2, 1, 3, 4, 4)
    found, strangers = torch.full((2, 3, 4, 4), 0.1), torch.full((2, 3, 4, 4), 0.2)
    figures = {m.metric: m.values for m in _psnr(originals, found, strangers, torch.zeros(3, 4, 4), "amortised", {})}
    assert figures["above_stranger_db"] == pytest.approx([20 * math.log10(2)] * 2)
