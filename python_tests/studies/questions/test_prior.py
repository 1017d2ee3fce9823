"""Study `prior`: its searches against `match`, its controls, and what it concludes from tables of both outcomes."""

import pytest
import torch

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data.image_set import content_hashes
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.studies import CLOTHES, Table, World
from r2f_ext.studies.questions import prior as module
from r2f_ext.studies.questions.prior import PriorStudy, prior_alone
from r2f_ext.studies.scene import base_of, private_images

QUICK = World(quick=True)
STUDY = PriorStudy()


def setting(**keys):
    return {"observed": "LoRA update", "start": "amortised", "prior": "none", **keys}


def table_of(*rows):
    """PSNR: (setting, route, values)."""
    return Table.of(
        [
            {"setting": keys, "seed": 0, "measured": [{"metric": "psnr_db", "values": v, "labels": {"route": route}}]}
            for keys, route, v in rows
        ]
    )


def test_settings_without_diffusers(monkeypatch):
    every = STUDY.settings(World())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    found = STUDY.settings(World())
    assert {each["prior"] for each in found} == {"none", "total variation"}
    assert {each["observed"] for each in found} == {"nothing", "decoded gradient", "LoRA update"}
    assert [each for each in every if each["prior"] != "score distillation"] == found
    said = STUDY.conclude(World(), table_of((setting(), "victim", [9.0, 9.5])))
    assert said[-1].startswith("Score distillation is left out: it needs diffusers")


def test_without_anything_observed_and_without_a_prior_the_start_is_scored():
    found = {(m.metric, m.labels["route"]): m.values for m in STUDY.measure(QUICK, setting(observed="nothing"), 0)}
    scene = module._scene(QUICK, CLOTHES, 0)
    own, stranger = scene.start.split(2)
    assert found["psnr_db", "victim"] == psnr_db(own, scene.private).tolist()
    assert found["psnr_db", "stranger"] == psnr_db(stranger, scene.private).tolist()
    assert found["psnr_db", "mean_image"] == scene.mean_image_db


def test_strangers_have_the_victims_labels_and_nothing_is_fitted_to_them():
    fitted, reserve = module._public(QUICK, CLOTHES, 0)
    private = private_images(base_of("embedded", QUICK.device), CLOTHES, 0, 2)
    assert not set(content_hashes(reserve.images)) & set(content_hashes(fitted.images))
    rows = module.stranger_rows(reserve, private.labels, 0)
    assert torch.equal(reserve.labels[rows], private.labels)


def test_the_prior_alone_follows_its_slope_within_the_box():
    config = MatchingConfig(steps=40, step_size=0.02, schedule="constant")
    wanted = torch.rand(2, 3, 8, 8)
    found = prior_alone(lambda images, step: images - wanted, torch.full_like(wanted, 0.5), config)
    assert (found - wanted).abs().mean() < 0.05
    assert torch.equal(
        prior_alone(lambda images, step: -images, wanted.clone(), config).clamp(0, 1).amax(), torch.tensor(1.0)
    )


def test_the_slope_of_total_variation_is_autograds():
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    rows, columns = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    (rows.flatten(1).mean(1) + columns.flatten(1).mean(1)).sum().mul(0.3).backward()
    found = module._variation(MatchingConfig(tv_weight=0.3))(images.detach(), 0)
    torch.testing.assert_close(found, images.grad)


HIGH, LOW = [20.0, 21.0, 22.0], [10.0, 11.0, 12.5]


def test_a_prior_that_adds_nothing_comes_first():
    said = STUDY.conclude(
        World(),
        table_of(
            (setting(observed="nothing"), "victim", HIGH),
            (setting(observed="nothing", prior="total variation"), "victim", HIGH),
            (setting(), "victim", HIGH),
            (setting(prior="total variation"), "victim", [20.1, 20.9, 22.0]),
            (setting(), "stranger", HIGH),
            (setting(prior="total variation"), "stranger", LOW),
        ),
    )
    assert said[0].startswith("No gain over matching without a prior: LoRA update from amortised with total")
    assert any(text.startswith("No gain of matching with a prior over that prior alone") for text in said)
    assert any(text.startswith("No better than their start") for text in said)
    (nothing,) = [text for text in said if text.startswith("Nothing recovered")]
    assert "no prior" in nothing and "total variation" not in nothing


def test_a_prior_that_helps_is_said_to():
    said = STUDY.conclude(
        World(),
        table_of(
            (setting(observed="nothing"), "victim", LOW),
            (setting(), "victim", LOW),
            (setting(prior="score distillation"), "victim", HIGH),
            (setting(prior="score distillation"), "stranger", LOW),
            (setting(prior="score distillation"), "mean_image", LOW),
        ),
    )
    assert not any(text.startswith("No gain") for text in said)
    assert any(text.startswith("A gain over matching without a prior") for text in said)
    assert "Every search is above the same search for a stranger of the same label." in said
    assert said[-1].startswith("Best: LoRA update from amortised with score distillation, 21.0")


@pytest.mark.parametrize(
    "rows", [(), ((setting(), "victim", [9.0]),), ((setting(prior="total variation"), "victim", LOW),)]
)
def test_missing_rows_and_single_values_are_no_error(rows):
    said = STUDY.conclude(World(), table_of(*rows))
    assert not any(text.startswith(("A gain", "No gain", "Every")) for text in said)


def test_a_search_that_lowers_the_similarity_is_told():
    rows = [(setting(observed="nothing"), [0.8, 0.7]), (setting(), [0.5, 0.6])]
    cells = [
        {"setting": keys, "seed": 0, "measured": [{"metric": "ssim", "values": v, "labels": {"route": "victim"}}]}
        for keys, v in rows
    ]
    said = STUDY.conclude(World(), Table.of(cells))
    assert said == [
        "Worse than their start by SSIM: LoRA update from amortised with no prior, -0.200 (-0.300 to -0.100; n = 2)."
    ]
    assert STUDY.conclude(World(), Table.of(cells[::-1][:1])) == []
