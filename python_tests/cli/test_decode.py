"""`r2f decode`, against the true gradient."""

import json

import pytest
from cases import cosine
from cli_cases import run
from safetensors.torch import load_file

from r2f_ext.capture import Capture


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


def test_fit_and_decode_a_kind_that_learns(stages, tmp_path):
    assert run("fit", stages.pairs, "--kind", "projection", "conv", "--out", tmp_path / "d") == 0
    assert json.loads((tmp_path / "d" / "decoders.json").read_text())["kinds"] == ["projection", "conv"]
    common = ("--pairs", stages.pairs, "--decoders", tmp_path / "d", "--kind", "conv")
    assert run("decode", stages.adapter, *common, "--out", tmp_path) == 0
    assert load_file(tmp_path / "gradients.safetensors")["blocks.0.attn.qkv"].shape == (1, 384, 128)
