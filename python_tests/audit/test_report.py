"""report.json: exactly the schema that was promised, with figures that can be recomputed."""

import json
from dataclasses import asdict

import pytest
import torch

from r2f_ext.audit.metrics import psnr_db, ssim
from r2f_ext.audit.report import MIN_GAIN_DB, build_report, set_report, write_report
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.inversion.routes import registry

NAME = "<script>alert('x')</script>"
PHASE0 = [{"route": "patch_position", "psnr_db_mean": 100.0, "psnr_db_min": 90.0, "seconds": 0.1, "why": "test."}]


@pytest.fixture(scope="module")
def part(audited):
    return set_report(NAME, audited.result, audited.proxy, audited.private)


@pytest.fixture(scope="module")
def report(audited, part, tmp_path_factory):
    """Read back from the file."""
    verdicts = identifiability(audited.target.base, adapter=audited.target, steps=1)
    built = build_report(
        audited.target, verdicts, {"p": audited.result}, [part], PHASE0, audited.config, {"pairs": 1.0, "total": 2.0}
    )
    return json.loads(write_report(tmp_path_factory.mktemp("report"), built).read_text())


def test_schema(report, audited):
    assert report["schema"] == 1
    assert {"r2f_ext", "torch", "timm", "peft", "python"} <= set(report["versions"])
    assert set(report["backend"].values()) <= {"cuda", "cpu", "reference"} and report["backend"]
    target = report["target"]
    assert (target["base"], target["rank"], target["tokens"]) == ("embedded", 8, 65)
    assert target["layers"] == [asdict(layer) for layer in audited.target.layers]
    assert list(target["identifiable"]) == list(registry())
    assert all(isinstance(value, bool) for value in target["identifiable"].values())
    assert set(report["phase0"][0]) >= {"route", "psnr_db_mean", "seconds"}
    assert report["decoders"] == audited.result.decoders
    for kinds in report["decoders"].values():
        assert set(kinds) == {"projection", "row_lmmse", "ridge"}
        assert all(set(figures) == {"cosine_mean", "cosine_p05", "norm_error"} for figures in kinds.values())
    assert report["pairs"] == {"count": 120, "per_second": audited.result.pairs_per_second}
    assert report["seconds"] == {"pairs": 1.0, "total": 2.0}
    assert report["config"] == asdict(audited.config)


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
    assert set(controls) == {"mean_image", "class_mean", "nearest_proxy", "shuffled_adapter"}
    originals = audited.private.batch(slice(None))
    mean = audited.proxy.batch(slice(None)).mean(0).expand_as(originals)
    assert controls["mean_image"] == pytest.approx(float(psnr_db(mean, originals).mean()), abs=1e-4)
    amortised = audited.result.reconstructions[1].images
    other = amortised[[2, 0, 1]]  # every victim gets another victim's reconstruction
    assert controls["shuffled_adapter"] == pytest.approx(float(psnr_db(other, originals).mean()), abs=1e-4)


def test_a_single_victim_is_compared_with_a_stranger(audited):
    part = set_report("x", audited.result, audited.proxy, audited.private.take(torch.tensor([1])), slice(1, 2))
    assert len(part.reconstructions[0].images) == 1
    assert torch.equal(part.controls.shuffled_adapter, audited.result.stranger)
    assert torch.equal(part.reconstructions[1].images[0], audited.result.reconstructions[1].images[1])


def test_without_originals_nothing_is_scored(audited):
    part = set_report("x", audited.result, audited.proxy, None)
    verdicts = identifiability(audited.target.base, adapter=audited.target)
    report = build_report(audited.target, verdicts, {"p": audited.result}, [part], [], audited.config, {})
    figures = report["reconstruction"]["x"]
    assert figures["controls"] == {} and "nothing is scored" in figures["verdict"]
    assert all(v["psnr_db_mean"] is None and v["label_accuracy"] is None for v in figures["routes"].values())


def test_the_verdict_is_against_the_best_of_what_was_known(part):
    from dataclasses import replace

    best, prior = part.scores(), part.control_psnr()
    gain = max(s.psnr_db_mean for s in best.values()) - max(prior["shuffled_adapter"], prior["mean_image"])
    assert f"{gain:.1f} dB" in part.verdict() if gain >= MIN_GAIN_DB else "Nothing recovered" in part.verdict()
    perfect = replace(part.reconstructions[0], images=part.originals)
    assert "gave away" in replace(part, reconstructions=[perfect]).verdict()
    useless = replace(part.reconstructions[0], images=1 - part.originals)
    assert "Nothing recovered" in replace(part, reconstructions=[useless]).verdict()


def test_a_far_update_is_noted(audited):
    from dataclasses import replace

    count = len(audited.result.far_from_proxy)
    for far in (1, 0):
        flags = torch.arange(count) < far
        notes = set_report("x", replace(audited.result, far_from_proxy=flags), audited.proxy, None).notes
        assert bool(notes) is (far > 0)
        assert not far or notes[0].startswith(f"1 of {count} updates")
