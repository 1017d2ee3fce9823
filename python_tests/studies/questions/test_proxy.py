"""The study `proxy`: its kinds of public images, its figures, and its sentences on tables of both outcomes."""

import pytest
import torch

from r2f_ext.data import ImageSet
from r2f_ext.studies import CLOTHES, Data, Table, World
from r2f_ext.studies.questions import proxy
from r2f_ext.studies.questions.proxy import COUNTS, HALF, INVERTED, MIXED, MOST, Proxy, alternating, proxies_of

STUDY = Proxy()


def test_settings_name_every_kind_once():
    settings = STUDY.settings(World())
    assert len(settings) == len({str(each) for each in settings}) == 4 * len(COUNTS) + 2 + 3
    own = STUDY.settings(World(data=(Data("mine", "folder", "folder"),)))
    assert {each["proxy"] for each in own if each["pairs"] == MOST} == {"mine", "procedural"}
    assert len(STUDY.settings(World(quick=True))) == 4


def test_variants_of_a_kind(embedded):
    world = World(quick=True)
    plain, inverted, half, mixed = (
        proxies_of(world, embedded, "clothes" + kind, 0, 20) for kind in ("", INVERTED, HALF, MIXED)
    )
    assert torch.equal(inverted.images, 255 - plain.images) and torch.equal(inverted.labels, plain.labels)
    assert len(half) == 20 and set(half.labels.tolist()) <= set(range(5))
    generated = proxies_of(world, embedded, "procedural", 0, 20)
    assert torch.equal(mixed.images[::2], plain.images[:10]) and torch.equal(mixed.images[1::2], generated.images[:10])
    assert torch.equal(mixed.labels[1::2], generated.labels[:10]) and not mixed.random_labels


def test_sets_alternate():
    sets = [
        ImageSet(n, torch.full((2, 1, 8, 8), v, dtype=torch.uint8), torch.full((2,), v))
        for n, v in (("a", 1), ("b", 2))
    ]
    assert alternating(*sets).labels.tolist() == [1, 2, 1, 2]


@pytest.fixture(scope="module")
def world():
    return World(data=(CLOTHES,), quick=True)


def test_one_value_a_victim_and_all_controls(world):
    measured = STUDY.measure(world, {"proxy": "clothes", "pairs": 24}, 0)
    assert {m.labels["decoder"] for m in measured if m.metric == "cosine"} == {
        "projection",
        "row_lmmse",
        "ridge",
        "class_mean_gradient",
    }
    assert {m.labels["route"] for m in measured if m.metric == "psnr_db"} == {"amortised", "stranger", "mean_image"}
    assert {len(m.values) for m in measured if m.metric != "distance"} == {proxy.QUICK_VICTIMS}
    assert all(m.labels["first"] and m.labels["private"] == "clothes" for m in measured)


def test_half_the_labels_are_scored_on_victims_of_the_other_half(world, monkeypatch):
    monkeypatch.setattr(proxy, "MOST", 24)
    everyone = STUDY.measure(world, {"proxy": "clothes", "pairs": 24}, 0)
    some = STUDY.measure(world, {"proxy": f"clothes{HALF}", "pairs": 24}, 0)
    (attacked,) = proxy._attacked(world, 0)
    missed = (attacked.observed.labels[:, 0] >= 5).tolist()
    assert 0 < sum(missed) < len(missed)
    images = [{m.labels["route"]: m.values for m in each if m.metric == "psnr_db"} for each in (everyone, some)]
    assert len(images[1]["amortised"]) == sum(missed)
    assert not any(m.labels.get("decoder") == "ridge" for m in some)


def cell(kind, pairs, cosine, db, count=6, private="clothes"):
    figures = [("cosine", {"decoder": name}, value) for name, value in (("ridge", cosine), ("projection", 0.2))]
    figures += [("cosine", {"decoder": "class_mean_gradient"}, 0.6)]
    figures += [("psnr_db", {"route": "amortised"}, db), ("psnr_db", {"route": "stranger"}, 14.0)]
    measured = [
        {"metric": metric, "values": [value] * count, "labels": {**labels, "private": private, "first": True}}
        for metric, labels, value in figures
    ]
    return {"setting": {"proxy": kind, "pairs": pairs}, "seed": 0, "measured": measured}


def test_kinds_are_told_best_first_and_lost_controls_before_all():
    cells = [cell("procedural", 300, 0.5, 13.0), cell("clothes", 100, 0.8, 17.0), cell("clothes", 300, 0.9, 18.0)]
    said = STUDY.conclude(World(), Table.of(cells))
    assert "the amortised route by a stranger's update (300 of procedural)" in said[0]
    assert "ridge by the class mean gradient (300 of procedural)" in said[0] and "of clothes)" not in said[0]
    kinds = next(each for each in said if "300 pairs, cosine of ridge" in each)
    assert kinds.index("clothes 0.900") < kinds.index("procedural 0.500") and "18.0 dB" in kinds
    assert any("reaches 17.0" in each and "with 100 pairs and 18.0" in each for each in said)


def test_little_is_said_of_little():
    assert STUDY.conclude(World(), Table.of([])) == []
    said = " ".join(STUDY.conclude(World(), Table.of([cell("clothes", 100, 0.9, 18.0, count=1)])))
    assert "ridge by the projection (100 of clothes)" in said and "and 18" not in said
