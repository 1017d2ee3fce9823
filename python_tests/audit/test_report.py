"""report.json: schema 2, with figures that can be recomputed."""

import json
from dataclasses import asdict, replace
from datetime import datetime
from math import nan

import pytest
import torch
from cases import cosine

from r2f_ext.audit.metrics import psnr_db, ssim
from r2f_ext.audit.phase0 import Phase0Report
from r2f_ext.audit.record import Inputs
from r2f_ext.audit.report import AuditReport
from r2f_ext.audit.schema import ClosedFormFigures
from r2f_ext.audit.sets import set_report
from r2f_ext.audit.write import write_report
from r2f_ext.capture import Capture
from r2f_ext.config import AuditConfig
from r2f_ext.inversion.routes import registry

NAME = "<script>alert('x')</script>"
INPUTS = Inputs(("./a",), "embedded", "embedded", None, None, None, "cpu")


def report_of(audited, part, seconds, **more):
    return AuditReport({part.proxy: audited.result}, [part], seconds, **more)


@pytest.fixture(scope="module")
def part(audited):
    return set_report(NAME, audited.result, audited.proxy, audited.private)


@pytest.fixture(scope="module")
def report(audited, part, tmp_path_factory):
    """Read back from the file."""
    phase0 = [Phase0Report(ClosedFormFigures("patch_position", 100.0, 90.0, 0.1, "test."), part.originals)]
    seconds = {"pairs": 1.0, "total": 2.0}
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, report_of(audited, part, seconds=seconds, inputs=INPUTS, notes=("n",), phase0=phase0))
    return json.loads((folder / "report.json").read_text())


def test_schema(report, audited):
    assert report["schema"] == 2
    assert {"r2f_ext", "torch", "timm", "peft", "python"} <= set(report["versions"])
    assert set(report["backend"].values()) <= {"cuda", "cpu", "reference"} and report["backend"]
    target = report["target"]
    assert (target["base"], target["rank"], target["tokens"]) == ("embedded", 8, 65)
    assert target["layers"] == [asdict(layer) for layer in audited.target.layers]
    assert list(target["identifiable"]) == list(registry())
    assert all(isinstance(value, bool) for value in target["identifiable"].values())
    assert set(report["phase0"][0]) == {"route", "psnr_db_mean", "psnr_db_min", "seconds", "why"}
    for layer, kinds in audited.result.decoders.items():
        for kind, figures in kinds.items():
            assert asdict(figures) == {**report["decoders"][layer][kind], "victim_true": None}
    for kinds in report["decoders"].values():
        assert set(kinds) == {"projection", "row_lmmse", "ridge"}
        held_out = {"cosine_mean", "cosine_p05", "norm_error", "class_mean_cosine", "floor_cosine"}
        assert all(set(figures) == held_out | {"victim_estimate", "victim_true"} for figures in kinds.values())
    assert report["pairs"] == {"count": 120, "per_second": audited.result.pairs_per_second}
    assert report["seconds"] == {"pairs": 1.0, "total": 2.0}
    assert AuditConfig.from_json(report["config"]) == audited.config
    assert report["inputs"] == {**asdict(INPUTS), "adapters": ["./a"]} and report["notes"] == ["n"]


def test_reconstruction_figures(report, audited):
    figures = report["reconstruction"][NAME]
    assert figures["n"] == 3 and set(figures["routes"]) == {"matching", "amortised", "amortised_refined"}
    originals = audited.private.batch(slice(None))
    for found in audited.result.reconstructions:
        values, psnr = figures["routes"][found.route], psnr_db(found.images, originals)
        assert {"psnr_db_mean", "psnr_db_std", "ssim_mean"} <= set(values)
        assert values["psnr_db_mean"] == pytest.approx(float(psnr.mean()))
        assert values["psnr_db_std"] == pytest.approx(float(psnr.std(correction=0)))
        assert values["ssim_mean"] == pytest.approx(float(ssim(found.images, originals).mean()))
        assert values["label_accuracy"] == pytest.approx(float((found.labels == audited.private.labels).float().mean()))


def test_controls(report, audited):
    controls = report["reconstruction"][NAME]["controls"]
    images = {"mean_image", "class_mean", "nearest_proxy", "shuffled_adapter"}
    assert set(controls) == images | {"noise_adapter", "same_label_stranger"}
    originals = audited.private.batch(slice(None))
    mean = audited.proxy.batch(slice(None)).mean(0).expand_as(originals)
    assert controls["mean_image"] == pytest.approx(float(psnr_db(mean, originals).mean()), abs=1e-4)
    amortised = named(audited.result.reconstructions, "amortised").images
    other = amortised[[2, 0, 1]]  # every victim gets another victim's reconstruction
    assert controls["shuffled_adapter"] == pytest.approx(float(psnr_db(other, originals).mean()), abs=1e-4)


def test_a_single_victim_is_compared_with_a_stranger(audited):
    part = set_report("x", audited.result, audited.proxy, audited.private.take(torch.tensor([1])), slice(1, 2))
    assert len(part.reconstructions[0].images) == 1
    assert torch.equal(part.controls.shuffled_adapter, audited.result.estimates.stranger)
    for found, whole in zip(part.reconstructions, audited.result.reconstructions, strict=True):
        assert torch.equal(found.images[0], whole.images[1])


def named(reconstructions, route):
    return next(found for found in reconstructions if found.route == route)


def test_figures_of_each_victim_are_cut_to_the_set(audited):
    residuals = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = replace(named(audited.result.reconstructions, "matching"), per_victim={"residual": residuals})
    result = replace(audited.result, reconstructions=[named(audited.result.reconstructions, "amortised"), found])
    part = set_report("x", result, audited.proxy, None, slice(1, 3))
    assert part.figures.routes["matching"].per_victim == {"residual": [2.0, 3.0]}
    assert len(part.reconstructions[1].labels) == 2
    assert part.reconstructions[1].why.endswith("(all 3 adapters together)")


def test_what_one_victim_shows_is_not_said_of_another_set(audited):
    """A figure and a sentence of the worst of all victims: a set without that victim must not pass them off as its."""
    worst = replace(
        named(audited.result.reconstructions, "matching"),
        why="The worst of all.",
        details={"expected_error": 9.0, "seconds": 1.0},
        per_victim={"expected_error": torch.tensor([9.0, 1.0, 2.0])},
    )
    result = replace(audited.result, reconstructions=[worst])
    whole, part = (set_report("x", result, audited.proxy, None, rows).figures for rows in (slice(None), slice(1, 3)))
    assert whole.routes["matching"].details["expected_error"] == 9.0
    figures = part.routes["matching"]
    assert figures.details == {"seconds": 1.0} and figures.per_victim == {"expected_error": [1.0, 2.0]}
    assert whole.routes["matching"].why == "The worst of all." != figures.why


def test_more_private_images_than_victims_are_paired_by_the_estimate_whatever_the_order_of_routes(audited):
    """And a note says that this flatters."""
    more = audited.private.take(torch.tensor([2, 1, 0, 0]))
    truth = named(audited.result.reconstructions, "amortised")
    perfect = replace(truth, images=audited.private.batch(slice(None)))
    for order in (1, -1):
        found = [perfect, named(audited.result.reconstructions, "matching")][::order]
        part = set_report("x", replace(audited.result, reconstructions=found), audited.proxy, more)
        assert torch.equal(part.originals, perfect.images) and torch.equal(part.labels, audited.private.labels)
        assert "one of 4 private images" in part.pairing and "flatters" in part.pairing


def test_without_originals_nothing_is_scored(audited):
    part = set_report("x", audited.result, audited.proxy, None)
    figures = report_of(audited, part, seconds={}).to_json()["reconstruction"]["x"]
    assert figures["controls"] == {} and "nothing is scored" in figures["verdict"]
    assert all(v["psnr_db_mean"] is None and v["label_accuracy"] is None for v in figures["routes"].values())


def test_the_conclusion_of_a_set_is_that_of_the_test_against_its_controls(part, report):
    figures = report["reconstruction"][NAME]
    assert figures["verdict"] == part.judgement.sentences[0]
    assert figures["leak"] is part.judgement.leak and figures["judged_route"] == "amortised"
    decisive = {"noise_adapter", "same_label_stranger", "class_mean", "mean_image"}  # matched: no shuffled adapter
    assert set(figures["control_intervals"]) == decisive
    for name, one in figures["control_intervals"].items():
        assert one["interval_db"][0] <= one["difference_db"] <= one["interval_db"][1]
        assert (one["p_value"] is None) is (name not in ("noise_adapter", "same_label_stranger"))
    amortised = figures["routes"]["amortised"]["psnr_db_mean"]
    assert figures["control_intervals"]["mean_image"]["difference_db"] == pytest.approx(
        amortised - figures["controls"]["mean_image"], abs=1e-4
    )


def test_schema_2_adds_the_verdict_and_figures_of_every_victim(report, part):
    assert set(report["verdict"]) >= {
        *("leak", "beyond_control_db", "interval_db", "confidence", "exact", "threat_model"),
        *("tried", "not_tried", "sentences"),
    }
    assert report["verdict"]["tried"] == ["amortised", "amortised_refined", "matching"]
    assert set(report["verdict"]["threat_model"]) == set(registry())
    not_tried = {one["route"]: one["why"] for one in report["verdict"]["not_tried"]}
    assert set(not_tried) == set(registry()) - set(report["verdict"]["tried"])
    assert "exact gradients" in not_tried["patch_position"] and "--routes" in not_tried["gauss_newton"]
    assert report["verdict"]["sentences"][-1].startswith("This is no proof of safety")
    assert datetime.fromisoformat(report["date"]).tzinfo is not None and report["command"] is None
    for found in part.reconstructions:
        values = report["reconstruction"][NAME]["routes"][found.route]
        assert values["psnr_db"] == pytest.approx(psnr_db(found.images, part.originals).tolist())
        assert values["ssim"] == pytest.approx(ssim(found.images, part.originals).tolist()) and values["exact"] is None


def test_an_exact_image_without_private_images_is_the_first_sentence(audited):
    exact = {"exact": torch.tensor([0.0, 1, 0]), "bound_db": torch.tensor([nan, 78.625, nan])}
    found = replace(named(audited.result.reconstructions, "matching"), route="gauss_newton", per_victim=exact)
    part = set_report("x", replace(audited.result, reconstructions=[found]), audited.proxy, None)
    data = report_of(audited, part, seconds={}).to_json()
    assert data["verdict"]["leak"] is True
    assert data["verdict"]["sentences"][0] == "Recovered exactly by gauss_newton: training image 2, to 78 dB or more."
    assert [one["exact"] for one in data["verdict"]["exact"]] == [False, True, False]
    assert data["reconstruction"]["x"]["routes"]["gauss_newton"]["exact"][1]["bound_db"] == 78.625


def test_decoders_are_scored_on_what_they_were_asked(report, audited):
    """The true cosine of the report is that of the decoded gradient with PEFT's own victims' gradient."""
    private = audited.private
    with Capture(audited.target) as capture:
        true = capture(private.batch(slice(None))[:, None], private.labels[:, None])
    for layer, kinds in report["decoders"].items():
        expected = cosine(audited.result.scored.decoded.dense[layer], true.dense(layer)).mean()
        assert kinds["ridge"]["victim_true"] == pytest.approx(float(expected), abs=1e-4)
        for figures in kinds.values():
            assert figures["floor_cosine"] == kinds["projection"]["cosine_mean"]
            assert figures["victim_estimate"] is None or 0 <= figures["victim_estimate"] <= 1
        assert kinds["projection"]["victim_true"] < kinds["ridge"]["victim_true"]


def test_a_far_update_is_noted(audited):
    count = len(audited.result.estimates.far)
    for far in (1, 0):
        flags = torch.arange(count) < far
        notes = set_report(
            "x", replace(audited.result, estimates=replace(audited.result.estimates, far=flags)), audited.proxy, None
        ).notes
        assert bool(notes) is (far > 0)
        assert not far or notes[0].startswith(f"1 of {count} updates")
