"""`r2f audit` from folders to the report."""

import json
import re

import pytest
import torch
from cases import changed_config, changed_weights, victim
from cli_cases import files_under, refused, run
from PIL import Image
from safetensors.torch import load_file

from r2f_ext.audit import run as audit_stages
from r2f_ext.data import content_hashes, load_images
from r2f_ext.inversion.routes import registry
from r2f_ext.types import Reconstruction


def test_the_search_for_the_exact_image_is_asked_for(adapter_folder, tmp_path, monkeypatch):
    """The search itself is run by `r2f invert`, in test_invert.py."""
    gray = torch.full((1, 3, 32, 32), 0.5)
    monkeypatch.setattr(
        type(registry()["gauss_newton"]), "run", lambda *args: Reconstruction("gauss_newton", gray, None, "test", 0.0)
    )
    options = ("--gauss-newton", "--count", 60, "--proxy", "embedded", "--out", tmp_path / "o")
    assert run("audit", adapter_folder, *options) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    (figures,) = report["reconstruction"].values()
    assert "gauss_newton" in figures["routes"] and report["config"]["gauss_newton"]


def test_audit_end_to_end(adapter_folder, tmp_path, capsys):
    out, file = tmp_path / "report", tmp_path / "printed.json"
    options = ("--count", 60, "--proxy", "embedded", "--private", "embedded:0", "--out", out, "--json", file)
    assert run("audit", adapter_folder, *options) == 0
    report, shown = json.loads((out / "report.json").read_text()), capsys.readouterr().out
    assert json.loads(file.read_text()) == report
    assert report["pairs"]["count"] == 60 and report["reconstruction"]["one"]["n"] == 1
    assert report["reconstruction"]["one"]["verdict"] in shown and "as after one step" in shown
    assert files_under(out) == ["gradients.safetensors", "reconstructions.png", "report.html", "report.json"]
    assert load_file(out / "gradients.safetensors")["blocks.0.attn.qkv"].shape == (1, 384, 128)


def test_audit_keeps_private_images_out_of_the_proxy(adapter_folder, tmp_path, monkeypatch, capsys):
    """The same folder as proxy and as private: every private image is dropped, and said so."""
    for i, image in enumerate(load_images("procedural", count=50).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    secret = tmp_path / "secret"
    secret.mkdir()
    for i in (3, 7):
        (secret / f"{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    seen, real = [], audit_stages.run_audit_stages
    monkeypatch.setattr(
        audit_stages,
        "run_audit_stages",
        lambda problem, proxy, *rest: seen.append(proxy) or real(problem, proxy, *rest),
    )
    public = tmp_path / "public"
    public.mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(public / path.name)
    assert run("audit", adapter_folder, "--proxy", public, "--private", secret, "--out", tmp_path / "o") == 0
    private = load_images(str(secret), role="private")
    assert len(seen[0]) == 48 and not set(content_hashes(seen[0].images)) & set(content_hashes(private.images))
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 images of" in shown and "were private ones" in shown and "flatters" in shown
    assert run("audit", "--replay", tmp_path / "o" / "report.json", "--out", tmp_path / "again") == 0
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("o", "again"))
    assert again["pairs"]["count"] == first["pairs"]["count"] == 48
    assert again["decoders"] == first["decoders"]


def test_audit_without_originals_and_with_an_odd_name_says_why_no_row_space_is_taken(adapter_folder, tmp_path, capsys):
    folder = changed_config(adapter_folder, tmp_path / "x[red] $_$ <script>")
    assert run("audit", folder, "--count", 40, "--proxy", "embedded", "--out", tmp_path / "[red]") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "x[red] $_$ <script>: 1 adapter," in shown and "nothing is scored" in shown and "[red]/report.html" in shown
    assert "adapter_rowspace: Not exact" in shown
    assert "<script" not in (tmp_path / "[red]" / "report.html").read_text()


def test_audit_of_clients_of_one_server(embedded, private, tmp_path):
    folders = [
        victim(embedded, tmp_path / str(i), private.batch([i]), private.labels[i : i + 1], target_modules=["mlp.fc1"])
        for i in range(2)
    ]
    out = tmp_path / "o"
    options = ("--count", 40, "--proxy", "embedded", "--private", "embedded", "--out", out)
    assert run("audit", *folders, *options) == 0
    assert json.loads((out / "report.json").read_text())["reconstruction"]["0"]["n"] == 2


def test_more_than_one_step_is_noticed(adapter_folder, tmp_path, capsys):
    moved = changed_weights(
        adapter_folder, tmp_path / "a", lambda w: {k: 3 * v if "lora_A" in k else v for k, v in w.items()}
    )
    assert run("audit", moved, "--count", 40, "--proxy", "embedded", "--out", tmp_path / "o") == 0
    assert "more than one step" in capsys.readouterr().out


def test_fewer_private_images_than_adapters_are_refused_before_any_work(adapter_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit_stages, "run_audit_stages", lambda *args: pytest.fail("the audit ran"))
    words = ("audit", adapter_folder, adapter_folder, "--count", 40, "--private", "embedded:1", "--out", tmp_path)
    assert re.search("names 1 images for 2 adapters", refused(capsys, *words))


@pytest.fixture(scope="module")
def wide_rank(embedded, private, tmp_path_factory):
    """r = 80 on block 0's qkv, three steps, seed 0."""
    folder = tmp_path_factory.mktemp("wide")
    return victim(embedded, folder / "a", private.batch([0]), private.labels[:1], steps=3, r=80)


def test_invert_and_audit_take_the_row_space_where_the_count_allows(wide_rank, tmp_path, capsys):
    assert run("pairs", wide_rank, "--count", 40, "--proxy", "embedded", "--out", tmp_path / "p") == 0
    options = ("--pairs", tmp_path / "p", "--out", tmp_path / "i", "--json", tmp_path / "i.json")
    assert run("invert", wide_rank, *options) == 0
    route = json.loads((tmp_path / "i.json").read_text())["routes"]["adapter_rowspace"]
    assert "manual_seed(0)" in route["why"] and "rank 80 against 65 tokens, stored as float32" in route["why"]
    assert (tmp_path / "i" / "adapter_rowspace.png").is_file()
    assert "--a0-seed 7 does not draw" in refused(capsys, "invert", wide_rank, *options, "--a0-seed", 7)
    missing = refused(capsys, "audit", wide_rank, "--count", 40, "--initial", tmp_path, "--out", tmp_path / "o")
    assert "has no adapter_model.safetensors" in missing
    assert run("audit", wide_rank, "--count", 40, "--proxy", "embedded", "--out", tmp_path / "o") == 0
    figures = json.loads((tmp_path / "o" / "report.json").read_text())["reconstruction"]["a"]["routes"]
    assert "adapter_rowspace" in figures and figures["adapter_rowspace"]["details"]["lora_rank"] == 80
