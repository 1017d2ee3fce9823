"""`r2f phase0` and `r2f identifiability`."""

import json
from pathlib import Path

from cli_cases import refused, run
from PIL import Image

from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.models import shape_of

ROOT = Path(__file__).resolve().parents[2]


def test_phase0(tmp_path, capsys):
    assert run("phase0", "--count", 2, "--out", tmp_path / "o", "--json", tmp_path / "p.json") == 0
    printed = json.loads((tmp_path / "p.json").read_text())
    assert [f["route"] for f in printed["phase0"]] == ["attention_rowspace", "patch_position"]
    assert all(f["psnr_db_min"] > 30 for f in printed["phase0"]) and printed["identifiable"]["patch_position"]
    assert f"{printed['phase0'][0]['psnr_db_mean']:.1f}" in capsys.readouterr().out
    with Image.open(tmp_path / "o" / "phase0.png") as image:
        assert image.format == "PNG"


def test_a_base_without_closed_forms_gets_a_sentence_and_no_empty_table(tmp_path, capsys):
    base = "timm-random:vit_tiny_patch16_224"
    assert run("phase0", "--base", base, "--images", "procedural", "--count", 1, "--out", tmp_path / "o") == 0
    printed = capsys.readouterr().out
    assert "No closed form applies to this base" in printed and "inverted in closed form" not in printed


def test_identifiability_of_named_models_matches_the_table_in_the_docs(tmp_path, capsys):
    names = ("vit_base_patch16_224", "vit_large_patch14_clip_224")
    assert run("identifiability", *names, "--json", tmp_path / "i.json") == 0
    printed = json.loads((tmp_path / "i.json").read_text())
    recorded = json.loads((ROOT / "benchmarks/results/0.1.0/identifiability.json").read_text())
    docs = (ROOT / "docs/routes.md").read_text()
    assert len(recorded) == 20
    for name in names:
        assert printed[name] == recorded[name]
        rows = printed[name]["attention_rowspace"]
        assert f"{rows['unknowns']} {'≤' if rows['identifiable'] else '>'} {rows['equations']}" in docs
    assert run("identifiability", "vit_tiny_patch16_224") == 0
    assert "too few directions" in " ".join(capsys.readouterr().out.split())
    assert "timm has no model" in refused(capsys, "identifiability", "vit_nonesuch")


def test_both_tables_of_identifiability_count_at_the_size_asked_for(tmp_path, capsys):
    name, printed = "vit_tiny_patch16_224", tmp_path / "i.json"
    assert run("identifiability", name, "--image-size", 64, "--json", printed) == 0
    counts = json.loads(printed.read_text())[name]
    shown = " ".join(capsys.readouterr().out.split())
    assert counts["tokens"] == 17  # (64 / 16)^2 patches and a class token
    expected = identifiability(shape_of(name, 64))
    for route in ("patch_position", "attention_rowspace"):
        assert counts[route]["why"] == expected[route].why and expected[route].why in shown
    assert expected["attention_rowspace"].why != identifiability(name)["attention_rowspace"].why
