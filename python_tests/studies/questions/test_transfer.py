"""The study `transfer`: its terms against plain computations, and its sentences on tables of both outcomes."""

import pytest
import torch

from r2f_ext.data import load_images
from r2f_ext.decoders import Ridge
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.studies import CLOTHES, Data, Table, World
from r2f_ext.studies.questions import transfer
from r2f_ext.studies.questions.transfer import Transfer, bound_of
from r2f_ext.studies.scene import mean_cosine, start_of, target_of, victims_of
from r2f_ext.studies.shift import split_of

STUDY = Transfer()


def test_every_public_set_meets_every_private_one_and_every_base_every_base():
    settings = STUDY.settings(World())
    assert len(settings) == len({str(each) for each in settings}) == 4 * 3 + 3 * 3
    assert {each["to"] for each in settings if each["moved"] == "data"} == {"clothes", "faces", "photos"}
    own = STUDY.settings(World(base="timm:x", data=(Data("mine", "folder", "procedural"),)))
    assert [(each["from"], each["to"]) for each in own] == [("mine", "mine"), ("procedural", "mine")]


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"QUICK_VICTIMS": 3, "QUICK_PAIRS": 24, "QUICK_HELD_OUT": 4}.items():
            patch.setattr(transfer, name, value)
        return STUDY.measure(World(data=(CLOTHES,), quick=True), STUDY.settings(World(quick=True))[1], 0)


def test_cosines_are_those_of_a_decoder_fitted_and_scored_by_hand(measured, embedded):
    """Procedural pairs, clothes as victims, every figure recomputed from the library's parts."""
    target = target_of(embedded)
    a = start_of(target, 0)
    proxies = load_images("procedural", count=24, seed=0)
    ridge = Ridge(2e-3, 0.9)
    ridge.fit(GeneratedPairs(target, a, proxies), 24)
    victims = victims_of(target, a, split_of(embedded, CLOTHES, 0, 3).victims)
    wanted = mean_cosine(ridge.decode(victims.updates), victims.gradient)
    (found,) = (m.values for m in measured if m.metric == "cosine" and m.labels["decoder"] == "ridge")
    torch.testing.assert_close(torch.tensor(found), wanted, atol=1e-4, rtol=1e-4)


def test_the_bound_is_the_sum_of_its_terms(measured):
    for decoder in ("ridge", "row_lmmse"):
        terms = {
            m.labels["term"]: torch.tensor(m.values).mean()
            for m in measured
            if m.metric == "loss" and m.labels["decoder"] == decoder
        }
        torch.testing.assert_close(terms["bound"], terms["proxy"] + terms["distance"] + terms["lambda"])
        torch.testing.assert_close(terms["slack"], terms["bound"] - terms["target"])
        (cosine,) = (m.values for m in measured if m.metric == "cosine" and m.labels["decoder"] == decoder)
        torch.testing.assert_close(terms["target"], 1 - torch.tensor(cosine).mean())
    counts = {m.labels["route"]: len(m.values) for m in measured if m.metric == "psnr_db"}
    assert counts == {"amortised": 3, "stranger": 3, "mean_image": 3}


def table(target_loss=0.2, distance=0.5, amortised=20.0, count=8):
    """Two shifts of images, the one home, as if measured on `count` victims."""
    losses = torch.full((5,), 0.1), torch.full((count,), target_loss)
    cells = []
    for source in ("clothes", "procedural"):
        far = source == "procedural"
        measured = bound_of(losses, distance * far, 0.15, {"decoder": "ridge", "shift": f"{source} to clothes"})
        rows = [vars(each) for each in measured]
        for decoder, value in (("ridge", 1 - target_loss), ("projection", 0.2), ("class_mean_gradient", 0.6)):
            rows.append({"metric": "cosine", "values": [value] * count, "labels": {"decoder": decoder}})
        for route, value in (("amortised", amortised), ("stranger", 14.0)):
            rows.append({"metric": "psnr_db", "values": [value] * count, "labels": {"route": route}})
        cells.append({"setting": {"moved": "data", "from": source, "to": "clothes"}, "seed": 0, "measured": rows})
    return cells


def test_a_bound_that_holds_and_routes_that_beat_their_controls():
    said = STUDY.conclude(World(), Table.of(table()))
    assert said[0].startswith("The bound of ridge says nothing (is 1 or more) in 0 of 2 shifts")
    assert "lies above it in 0; bound minus target loss is 0.05 to 0.55, median 0.30" in said[0]
    assert not any("not shown to beat" in each for each in said)
    assert "0.80 (0.80 to 0.80; n = 8) from procedural (20.0 dB)" in said[-1]


def test_a_bound_that_is_broken_or_says_nothing_and_routes_that_lose():
    said = " ".join(STUDY.conclude(World(), Table.of(table(target_loss=0.9, distance=1.6, amortised=13.0))))
    assert "in 1 of 2 shifts" in said and "lies above it in 1;" in said
    assert "ridge by the projection (clothes to clothes, procedural to clothes)" in said
    assert "amortised route by a stranger's update (clothes to clothes, procedural to clothes)" in said


def test_missing_rows_and_single_values_are_not_told_as_wins():
    assert STUDY.conclude(World(), Table.of([])) == []
    cells = table()
    cells[0]["measured"] = [each for each in cells[0]["measured"] if each["metric"] == "cosine"]
    assert "the amortised route by" not in " ".join(STUDY.conclude(World(), Table.of(cells)))
    alone = " ".join(STUDY.conclude(World(), Table.of(table(count=1))))
    assert "ridge by the projection (clothes to clothes," in alone
