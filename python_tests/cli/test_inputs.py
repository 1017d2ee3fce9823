"""Pairs, decoders and adapters that belong together."""

import torch
from cases import peft_model, save
from cli_cases import FIRST, files_under, refused, run


def test_two_clients_of_different_layers(adapter_folder, embedded, tmp_path, out, capsys):
    other = peft_model(embedded, target_modules=["mlp.fc1", "attn.qkv"])
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-3)
    words = ("--count", 40, "--proxy", "embedded", "--out", out)
    line = refused(capsys, "audit", adapter_folder, save(other, tmp_path / "b"), *words)
    assert "do not adapt the same layers" in line
    line = refused(capsys, "audit", tmp_path / "b", adapter_folder, *words)
    assert "do not adapt the same layers" in line and not files_under(out)


def test_pairs_and_decoders_of_another_adapter(stages, embedded, tmp_path, out, capsys):
    other = peft_model(embedded, seed=5)
    with torch.no_grad():
        other.base_model.model.get_submodule(FIRST).lora_B["default"].weight.fill_(1e-3)
    folder = save(other, tmp_path / "other")
    for words in (("invert",), ("decode", "--decoders", stages.decoders)):
        line = refused(capsys, words[0], folder, "--pairs", stages.pairs, *words[1:], "--out", out)
        assert "were made for another adapter" in line
    assert run("pairs", stages.adapter, "--count", 24, "--proxy", "embedded", "--out", tmp_path / "p") == 0
    line = refused(
        capsys, "decode", stages.adapter, "--pairs", tmp_path / "p", "--decoders", stages.decoders, "--out", out
    )
    assert "fitted to other pairs" in line and not files_under(out)
    line = refused(
        capsys, "decode", stages.adapter, "--pairs", stages.pairs, "--decoders", tmp_path / "none", "--out", out
    )
    assert "no fitted decoders" in line
