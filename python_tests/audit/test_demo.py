"""The demo end to end, at toy sizes."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from route_cases import posed
from safetensors.torch import load_file

from r2f_ext.audit import demo as module
from r2f_ext.audit.demo import demo
from r2f_ext.config import AuditConfig
from r2f_ext.data import content_hashes, load_images
from r2f_ext.inversion.gauss_newton import FINISH
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.routes import Outcome
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.progress import Stages
from r2f_ext.types import Reconstruction

pytestmark = pytest.mark.usefixtures("few_controls")


def test_the_demo_writes_a_whole_report(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FASHION_VICTIMS", 3)
    monkeypatch.setattr(module, "FACE_VICTIMS", 2)
    proxies, real = [], module.run.run_audit_stages

    def seen(problem, proxy, *rest, **more):
        proxies.append(proxy)
        return real(problem, proxy, *rest, **more)

    monkeypatch.setattr(module.run, "run_audit_stages", seen)
    monkeypatch.setattr(module, "SEARCHED", 1)
    steps = MatchingConfig(steps=2)
    search = GaussNewtonConfig(passes=1)
    config = AuditConfig(pairs=80, decoder_pairs=60, held_out=12, matching=steps, refinement=steps, search=search)
    done = demo(tmp_path, config)

    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(json.dumps(done.to_json()))
    assert {name: part["n"] for name, part in report["reconstruction"].items()} == {
        "fashion_mnist": 3,
        "fashion_mnist_procedural": 3,
        "lfw": 2,
        "fashion_mnist_searched": 1,
    }
    assert [part["proxy"] for part in report["reconstruction"].values()] == [
        "embedded",
        "procedural",
        "procedural",
        "embedded",
    ]
    again = report["reconstruction"]["fashion_mnist_searched"]
    assert again["leak"] is None and again["verdict"].startswith("Not judged here") and again["controls"]
    assert again["control_intervals"] == {} and "gauss_newton" in report["verdict"]["tried"]
    assert report["verdict"]["leak"] is not None
    assert set(report["proxies"]) == {"embedded", "procedural"}
    assert AuditConfig.from_json(report["config"]) == config
    assert report["decoders"] == report["proxies"]["embedded"]["decoders"]
    assert len(report["target"]["layers"]) == 16
    assert not report["target"]["identifiable"]["patch_position"]  # adapters show no exact gradient
    assert {f["route"] for f in report["phase0"]} == {"patch_position", "attention_rowspace"}
    assert min(f["psnr_db_mean"] for f in report["phase0"]) > 40
    assert {"victims", "phase 0", "embedded: pairs", "procedural: matching", "total"} <= set(report["seconds"])
    assert report["seconds"]["total"] == pytest.approx(max(report["seconds"].values()))
    secret = {h for part in done.sets for h in content_hashes((part.originals * 255).round().byte())}
    searched = report["reconstruction"]["fashion_mnist_searched"]["routes"]
    assert list(searched) == ["amortised_by_label", "amortised_nearby", "gauss_newton"]
    assert "amortised_by_label" not in {one["route"] for one in report["verdict"]["not_tried"]}
    (passes,) = searched["gauss_newton"]["per_victim"]["passes"]
    assert 1 <= passes <= 1 + FINISH.passes  # one was asked for; float64 may have gone on
    assert len(secret) == 5 and not any(secret & set(content_hashes(proxy.images)) for proxy in proxies)
    assert load_file(tmp_path / "gradients_procedural.safetensors")["blocks.0.attn.qkv"].shape == (5, 384, 128)
    assert "<h1>" in (tmp_path / "report.html").read_text()
    with Image.open(tmp_path / "reconstructions.png") as image:
        image.load()
    assert len(list((tmp_path / "victims").glob("*/*/adapter_model.safetensors"))) == 5


def test_a_search_that_fails_leaves_no_set_and_a_reason(monkeypatch):
    problem, images = posed()
    not_run = {"amortised": "Not run: it needs proxy pairs.", "gauss_newton": "Failed: out of memory."}
    monkeypatch.setattr(module, "adapter_problem", lambda *_: problem)
    monkeypatch.setattr(module, "run_routes", lambda *_: Outcome([], not_run))
    amortised = Reconstruction("amortised", images, torch.zeros(len(images), dtype=torch.int64), "", 0.0)
    result = SimpleNamespace(problem=problem, reconstructions=[amortised], verdicts={}, config=AuditConfig())
    private = load_images("embedded", role="private", count=2)
    sets, said = module._searched(result, private, [], Stages())
    assert sets == [] and said == {"gauss_newton": "Failed: out of memory."}
