import pytest
import torch

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.inversion.patch_position import invert_patch_position
from r2f_ext.studies import CLOTHES, Row, Table, World
from r2f_ext.studies.questions.phase0 import LARGE, Phase0, matched
from r2f_ext.studies.scene import base_of, private_images

WORLD = World(data=(CLOTHES,), quick=True)


def row(metric, values, **keys):
    return Row(keys, metric, tuple(values), min(values), max(values))


def test_the_figures_are_those_of_the_routes_themselves():
    found = Phase0().measure(WORLD, {"base": "embedded", "data": "clothes"}, 1)
    values = {(one.metric, one.labels.get("route")): one.values for one in found}
    base = base_of("embedded", WORLD.device)
    private = private_images(base, CLOTHES, 1, 2)
    images = private.batch(slice(None))
    for victim, gradient in enumerate(exact_gradients(base, images, private.labels)):
        psnr = psnr_db(invert_patch_position(base, gradient).images, images[victim, None])
        assert values["psnr_db", "patch_position"][victim] == pytest.approx(float(psnr), abs=1e-6)
    assert values["worst_db", "patch_position"] == [min(values["psnr_db", "patch_position"])]
    assert (values["unknowns", "patch_position"], values["equations", "patch_position"]) == ([64], [128])
    assert (values["unknowns", "attention_rowspace"], values["equations", "attention_rowspace"]) == ([49], [63])
    assert values["psnr_db", "mean_image"] != values["psnr_db", "stranger"]


def test_of_the_large_bases_one_allows_both_closed_forms():
    allowed = {
        spec: [
            identifiability(spec.split(":")[1])[route].identifiable
            for route in ("patch_position", "attention_rowspace")
        ]
        for spec in LARGE
    }
    assert sorted(allowed.values()) == [[True, False], [True, True]]


def test_matching_starts_from_gray_and_stays_within_the_range_of_pixels():
    base = base_of("embedded", WORLD.device)
    private = private_images(base, CLOTHES, 0, 1)
    images, seconds = matched(base, private.batch(slice(None)), private.labels)
    assert images.shape == (1, 3, 32, 32)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert not torch.equal(images, torch.full_like(images, 0.5))
    assert seconds > 0


def test_conclusions_follow_the_table():
    keys = {"base": "small", "data": "clothes"}
    rows = [
        row("unknowns", [769.0], **keys, route="attention_rowspace"),
        row("equations", [571.0], **keys, route="attention_rowspace"),
        row("unknowns", [769.0], **{**keys, "data": "faces"}, route="attention_rowspace"),
        row("psnr_db", [39.0, 100.0], **keys, route="patch_position"),
        row("psnr_db", [9.0, 10.0], **keys, route="matching"),
        row("psnr_db", [12.0, 12.4], **keys, route="mean_image"),
    ]
    said = Phase0().conclude(WORLD, Table(rows))
    assert said[0] == "attention_rowspace does not run on small: 769 unknowns against 571 equations."
    assert said[1].startswith("matching on small, clothes: 9.5") and "mean image has 12.2 dB" in said[1]
    assert "at worst 39.0, not exact for every image" in said[2]
    exact = [row("psnr_db", [99.0, 100.0], **keys, route="patch_position")]
    assert "at worst 99.0, exact (at least" in Phase0().conclude(WORLD, Table(exact))[0]
    assert Phase0().conclude(WORLD, Table([])) == []
