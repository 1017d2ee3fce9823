"""Every command on real files, with small counts; the files are checked against the library."""

import json
import re
from pathlib import Path

import pytest
import torch
from cases import changed_config, changed_weights, cosine, victim
from cli_cases import few_steps, files_under, refused, run
from PIL import Image
from safetensors.torch import load_file

from r2f_ext.audit import run as audit_stages
from r2f_ext.capture import Capture
from r2f_ext.data import content_hashes, load_images
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.models import shape_of
from r2f_ext.pairs import StoredPairs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    few_steps(monkeypatch)


def test_pairs_wrote_pairs(stages, embedded, bound):
    stored = StoredPairs(stages.pairs, embedded)
    assert stored.manifest["precision"] == "float32"
    assert len(stored) == 40 and stored.manifest["proxy"] == "embedded" and stored.manifest["base"] == "embedded"
    assert stored.target.layers == bound[0].layers
    shard = ["factors-00000.safetensors", "manifest.json", "pairs-00000.safetensors"]
    assert files_under(stages.pairs) == [*shard, "start.safetensors"]


def test_fit_wrote_every_kind(stages):
    record = json.loads((stages.decoders / "decoders.json").read_text())
    assert record["kinds"] == ["projection", "row_lmmse", "ridge"] and record["count"] == 32
    kinds = [f"{kind}.safetensors" for kind in ("projection", "ridge", "row_lmmse")]
    assert files_under(stages.decoders) == ["decoders.json", *kinds]


def test_decode_points_along_the_true_gradient(stages, bound, private):
    decoded = load_file(stages.gradients)
    with Capture(bound[0]) as capture:
        true = capture(private.batch([0])[:, None], private.labels[:1, None])
    for name in bound[0].names:
        assert cosine(decoded[name], true.dense(name)).item() > 0.4


@pytest.mark.parametrize("kind", ["projection", "row_lmmse"])
def test_decode_with_another_kind(stages, tmp_path, kind):
    common = ("--pairs", stages.pairs, "--decoders", stages.decoders)
    out = tmp_path / "out.json"
    assert run("decode", stages.adapter, *common, "--kind", kind, "--out", tmp_path, "--json", out) == 0
    decoded, printed = load_file(tmp_path / "gradients.safetensors"), json.loads(out.read_text())
    assert printed["kind"] == kind and printed["file"] == "gradients.safetensors"
    assert printed["norms"] == pytest.approx({name: float(g.norm()) for name, g in decoded.items()}, rel=1e-4)


def test_fit_prints_what_it_says_in_json(stages, tmp_path, capsys):
    assert run("fit", stages.pairs, "--out", tmp_path / "d", "--json", tmp_path / "fit.json") == 0
    printed = json.loads((tmp_path / "fit.json").read_text())
    assert (printed["fitted"], printed["held_out"]) == (32, 8)
    shown = capsys.readouterr().out
    for kind in ("projection", "row_lmmse", "ridge"):
        figures = printed["decoders"][kind]["blocks.0.attn.qkv"]
        assert f"{figures['cosine_mean']:.3f} ({figures['cosine_p05']:.3f})" in shown


def test_fit_and_decode_a_kind_that_learns(stages, tmp_path):
    assert run("fit", stages.pairs, "--kind", "projection", "conv", "--out", tmp_path / "d") == 0
    assert json.loads((tmp_path / "d" / "decoders.json").read_text())["kinds"] == ["projection", "conv"]
    common = ("--pairs", stages.pairs, "--decoders", tmp_path / "d", "--kind", "conv")
    assert run("decode", stages.adapter, *common, "--out", tmp_path) == 0
    assert load_file(tmp_path / "gradients.safetensors")["blocks.0.attn.qkv"].shape == (1, 384, 128)


@pytest.mark.parametrize(("gradients", "inverter"), [(True, "ridge"), (False, "unet")])
def test_invert(stages, tmp_path, gradients, inverter):
    more = ("--inverter", inverter, *(("--gradients", stages.gradients) if gradients else ()))
    out = tmp_path / "i"
    code = run("invert", stages.adapter, "--pairs", stages.pairs, *more, "--out", out, "--json", tmp_path / "i.json")
    assert code == 0
    routes = ["amortised", "amortised_refined"] + ["matching"] * gradients
    assert list(json.loads((tmp_path / "i.json").read_text())["routes"]) == routes
    assert files_under(out) == sorted([f"{route}.png" for route in routes] + ["images.safetensors"])
    for images in load_file(out / "images.safetensors").values():
        assert images.shape == (1, 3, 32, 32) and images.min() >= 0 and images.max() <= 1


@pytest.mark.slow
def test_invert_and_audit_search_for_the_exact_image(stages, tmp_path, capsys):
    out = tmp_path / "i"
    options = ("--pairs", stages.pairs, "--out", out, "--json", tmp_path / "i.json")
    assert run("invert", stages.adapter, "--gauss-newton", *options) == 0
    route = json.loads((tmp_path / "i.json").read_text())["routes"]["gauss_newton"]
    assert "of 1 images are exact" in route["why"] and route["per_victim"]["passes"][0] >= 1
    assert (out / "gauss_newton.png").is_file()
    audit = (
        "audit",
        stages.adapter,
        "--gauss-newton",
        "--count",
        60,
        "--proxy",
        "embedded",
        "--out",
        tmp_path / "o",
    )
    assert run(*audit) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    (figures,) = report["reconstruction"].values()
    assert "gauss_newton" in figures["routes"] and report["config"]["gauss_newton"]


def test_phase0(tmp_path, capsys):
    assert run("phase0", "--count", 2, "--out", tmp_path / "o", "--json", tmp_path / "p.json") == 0
    printed = json.loads((tmp_path / "p.json").read_text())
    assert [f["route"] for f in printed["phase0"]] == ["attention_rowspace", "patch_position"]
    assert all(f["psnr_db_min"] > 30 for f in printed["phase0"]) and printed["identifiable"]["patch_position"]
    assert f"{printed['phase0'][0]['psnr_db_mean']:.1f}" in capsys.readouterr().out
    with Image.open(tmp_path / "o" / "phase0.png") as image:
        assert image.format == "PNG"


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


def test_audit_without_originals_and_with_an_odd_name(adapter_folder, tmp_path, capsys):
    folder = changed_config(adapter_folder, tmp_path / "x[red] $_$ <script>")
    assert run("audit", folder, "--count", 40, "--proxy", "embedded", "--out", tmp_path / "[red]") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "x[red] $_$ <script>: 1 adapter," in shown and "nothing is scored" in shown and "[red]/report.html" in shown
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


def test_env(capsys, tmp_path):
    assert run("env", "--json", tmp_path / "deep" / "env.json") == 0
    written = json.loads((tmp_path / "deep" / "env.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert written["versions"]["torch"] == torch.__version__


def test_the_same_seed_makes_the_same_pairs(stages, tmp_path):
    again = ("pairs", stages.adapter, "--count", 40, "--proxy", "embedded", "--out")
    assert run(*again, tmp_path / "a") == 0 and run(*again, tmp_path / "b", "--seed", 1) == 0
    labels = [
        load_file(f / "pairs-00000.safetensors")["images"] for f in (stages.pairs, tmp_path / "a", tmp_path / "b")
    ]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_pairs_in_bfloat16(stages, tmp_path):
    out = tmp_path / "low"
    assert (
        run("pairs", stages.adapter, "--count", 4, "--proxy", "embedded", "--precision", "bfloat16", "--out", out) == 0
    )
    assert json.loads((out / "manifest.json").read_text())["precision"] == "bfloat16"
    got, full = (load_file(folder / "pairs-00000.safetensors") for folder in (out, stages.pairs))
    names = [name for name in got if name.startswith("update/")]
    assert names and all(cosine(got[n], full[n][:4]).min() > 0.999 for n in names)


def test_pairs_of_victims_that_train_for_steps(stages, tmp_path, capsys):
    out = tmp_path / "long"
    words = ("pairs", stages.adapter, "--count", 4, "--proxy", "embedded", "--steps", 3, "--samples", 2, "--lr", 0.05)
    assert run(*words, "--out", out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["count"] == 4 and manifest["group_size"] == 2
    assert manifest["training"]["steps"] == 3 and manifest["training"]["lr"] == 0.05
    tensors = load_file(out / "pairs-00000.safetensors")
    assert len(tensors["images"]) == 4 and tensors["images"].shape[1] == 2
    assert refused(capsys, *words, "--momentum", -1, "--out", out).startswith("r2f pairs: the victims' training")


def test_pairs_of_a_second_adapter_from_the_first_ones(stages, embedded, private, tmp_path, capsys):
    other = victim(embedded, tmp_path / "other", private.batch([1]), private.labels[1:2], r=4)
    cached = ("pairs", other, "--count", 10, "--cache", stages.pairs, "--out", tmp_path / "cached")
    assert run(*cached) == 0
    assert run("pairs", other, "--count", 10, "--proxy", "embedded", "--out", tmp_path / "anew") == 0
    got, expected = (load_file(tmp_path / f / "pairs-00000.safetensors") for f in ("cached", "anew"))
    names = [name for name in expected if name.startswith("update/")]
    assert names and all(cosine(got[n], expected[n]).min() > 0.9999 for n in names)
    assert json.loads((tmp_path / "cached" / "manifest.json").read_text())["proxy"] == "embedded"
    for more in (("--steps", 2), ("--dense",)):
        assert "leave training and --dense out" in refused(capsys, *cached, *more)
    same = ("pairs", other, "--cache", stages.pairs, "--out", stages.pairs)
    assert "are the same folder" in refused(capsys, *same) and (stages.pairs / "manifest.json").exists()


def test_fewer_private_images_than_adapters_are_refused_before_any_work(adapter_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit_stages, "run_audit_stages", lambda *args: pytest.fail("the audit ran"))
    words = ("audit", adapter_folder, adapter_folder, "--count", 40, "--private", "embedded:1", "--out", tmp_path)
    assert re.search("names 1 images for 2 adapters", refused(capsys, *words))


def test_identifiability_of_named_models_matches_the_table_in_the_docs(tmp_path, capsys):
    names = ("vit_base_patch16_224", "vit_large_patch14_clip_224")
    assert run("identifiability", *names, "--json", tmp_path / "i.json") == 0
    printed = json.loads((tmp_path / "i.json").read_text())
    recorded = json.loads((ROOT / "benchmarks/results/0.1.0/identifiability.json").read_text())
    docs = (ROOT / "docs/inversion.md").read_text()
    assert len(recorded) == 20
    for name in names:
        assert printed[name] == recorded[name]
        rows = printed[name]["attention_rowspace"]
        assert f"{rows['unknowns']} {'≤' if rows['identifiable'] else '>'} {rows['equations']}" in docs
    assert run("identifiability", "vit_tiny_patch16_224") == 0
    assert "too few directions" in " ".join(capsys.readouterr().out.split())
    assert "timm has no model" in refused(capsys, "identifiability", "vit_nonesuch")


def test_audit_says_why_the_row_space_of_the_adapter_is_not_taken(adapter_folder, tmp_path, capsys):
    words = ("--count", 40, "--proxy", "embedded", "--out", tmp_path / "o")
    assert run("audit", adapter_folder, *words) == 0
    assert "adapter_rowspace: Not exact" in capsys.readouterr().out


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
