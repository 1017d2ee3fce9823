"""The examples do what their first lines say; the tutorial's adapter goes from its folder to a report."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from r2f_ext import AuditConfig, audit, load_images
from r2f_ext.audit.inputs import load_adapters
from r2f_ext.inversion.route import Certainty
from r2f_ext.models import evidence_of
from r2f_ext.models.embedded import WEIGHTS

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(name: str, *words: object, **replaced: object) -> None:
    """Run an example's main() with these arguments, in this process; `replaced` are names of its module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, words)])
        for attribute, value in replaced.items():
            patch.setattr(module, attribute, value)
        module.main()


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    """The tutorial's base and adapter, smaller still: 3 epochs of 128 images in one step each."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_example("tutorial_adapter", "--out", folder, "--images", 128, "--epochs", 3, "--width", 32, "--depth", 2)
    return folder


def test_what_can_be_known_of_the_tutorials_adapter(tutorial):
    loaded = load_adapters([tutorial / "adapter"], str(tutorial / "base"))
    target, (update,), (facts,) = loaded.target, loaded.updates, loaded.facts
    assert [layer.name for layer in target.layers] == [
        f"vit.layers.{block}.attention.{part}_proj" for block in (0, 1) for part in ("q", "v")
    ]
    assert {(layer.rank, layer.scale) for layer in target.layers} == {(16, 1.0)}
    assert target.base.num_classes == 10 and target.base.input_shape == (3, 32, 32) and target.base.notes == ()
    assert facts.dropout == 0.1
    (dropout, head) = facts.notes
    assert "lora_dropout is 0.1" in dropout and "nothing is exact" in dropout
    assert "The start of classifier.bias, classifier.weight is not in the base" in head
    said = evidence_of([update], loaded.facts)
    assert said.steps is None
    assert any("more than one step was taken" in sentence for sentence in said.sentences)
    assert any("do not show how many images a step saw" in sentence for sentence in said.sentences)


def test_the_tutorials_adapter_goes_through_to_a_report(few_controls, tutorial, recwarn):
    config = AuditConfig(pairs=60, decoder_pairs=40, held_out=10, routes=("amortised",))
    report = audit([tutorial / "adapter"], base=str(tutorial / "base"), config=config)
    assert [str(each.message) for each in recwarn] == []  # PEFT and transformers warn of what is checked here
    assert all(verdict.certainty is not Certainty.EXACT for verdict in report.first.verdicts.values())
    assert "the base is a ViTForImageClassification" in report.first.verdicts["adapter_rowspace"].why
    found = report.to_json()
    assert found["target"]["tokens"] == 65 and found["target"]["base"] == "base"
    assert set(found["decoders"]) == {layer["name"] for layer in found["target"]["layers"]}
    (part,) = found["reconstruction"].values()
    assert set(part["routes"]) == {"amortised"} and part["n"] == 1


def test_another_base_than_the_named_one_is_said(tutorial, tmp_path):
    """The right architecture with other weights: nothing in the file can show it, and the name can."""
    run_example("tutorial_adapter", "--out", tmp_path, "--images", 8, "--epochs", 1, "--width", 32, "--depth", 2)
    other = (tmp_path / "base").rename(tmp_path / "other")
    (facts,) = load_adapters([tutorial / "adapter"], str(other)).facts
    assert any("names 'base' as its base, and it is audited on 'other'" in note for note in facts.notes)


def test_pretraining_writes_weights_as_they_are_shipped(tmp_path, capsys):
    """Two epochs of two steps on 32 images: names, shapes, the fresh head and the metadata are the asset's."""

    def few(split):
        images, labels = load_images("embedded", count=32).images[:, 0, 2:30, 2:30], torch.arange(32) % 10
        return images.clone(), labels

    written = tmp_path / "weights.safetensors"
    run_example("pretrain_embedded", "--epochs", 2, "--batch", 16, load_fashion_mnist=few, WEIGHTS=written)
    assert "step 4 of 4: loss" in capsys.readouterr().out
    with safe_open(written, "pt") as found, safe_open(WEIGHTS, "pt") as shipped:
        assert {key: found.get_tensor(key).shape for key in found.keys()} == {  # noqa: SIM118
            key: shipped.get_tensor(key).shape
            for key in shipped.keys()  # noqa: SIM118
        }
        assert torch.equal(found.get_tensor("head.weight"), shipped.get_tensor("head.weight"))
        assert found.metadata()["pretraining"] == "Fashion-MNIST train, 2 epochs, seed 0"
        assert found.metadata().keys() == shipped.metadata().keys()
