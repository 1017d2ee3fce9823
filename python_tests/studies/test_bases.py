"""The bases that are trained once: what is in their folders, when they are trained, and on which labels."""

from dataclasses import replace

import pytest
import torch
from study_cases import Squares

from r2f_ext.cli import main
from r2f_ext.data import FAMILIES, procedural_families, procedural_images
from r2f_ext.models import load_base
from r2f_ext.studies import bases, questions
from r2f_ext.studies.bases import TRAINED, recipe_of, trained_base, turned_families
from r2f_ext.studies.scene import base_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R2F_DATA", str(tmp_path_factory.mktemp("data")))
        yield tmp_path_factory.getbasetemp()


@pytest.mark.parametrize("name", TRAINED)
def test_a_base_is_trained_once_and_kept(name, folder, monkeypatch, capsys):
    made = trained_base(name, CPU, quick=True)
    assert f"Training the base '{name}' once, 4 steps" in capsys.readouterr().err
    monkeypatch.setattr(bases, "pretrain", lambda *_: pytest.fail("it was trained again"))
    again = trained_base(name, CPU, quick=True)
    assert capsys.readouterr().err == ""
    for key, value in made.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value)
    (note,) = made.notes
    assert made.spec == name and f"images of '{TRAINED[name].images}' for 4 steps" in note


def test_it_differs_from_the_embedded_one_in_all_but_the_head(folder, embedded):
    one, other = (trained_base(name, CPU, quick=True) for name in TRAINED)
    for base in (one, other):
        assert (base.input_shape, base.mean, base.std, base.num_classes) == (
            embedded.input_shape,
            embedded.mean,
            embedded.std,
            embedded.num_classes,
        )
        own, shipped = base.model.state_dict(), embedded.model.state_dict()
        assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in shipped.items()}
        assert torch.equal(own["head.weight"], shipped["head.weight"])
        assert not torch.allclose(own["blocks.0.attn.qkv.weight"], shipped["blocks.0.attn.qkv.weight"], atol=1e-3)
    assert not torch.equal(one.model.state_dict()["pos_embed"], other.model.state_dict()["pos_embed"])


def test_the_folder_computes_what_was_trained(folder, monkeypatch):
    """timm builds the same network from the folder as `build_embedded_vit` does."""
    trained = []
    pretrain = bases.pretrain
    monkeypatch.setattr(bases, "pretrain", lambda *args: trained.append(pretrain(*args)) or trained[0])
    monkeypatch.setattr(bases, "QUICK_STEPS", 1)
    found = trained_base("embedded-seed1", CPU, quick=True)
    inputs = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(found.model(inputs), trained[0].eval()(inputs), atol=1e-5, rtol=1e-4)


def test_recipes_have_folders_of_their_own():
    recipe = TRAINED["embedded-seed1"]
    others = [recipe_of("embedded-seed1", quick=True), replace(recipe, count=9), *TRAINED.values()]
    assert len({each.digest for each in others}) == len(others)
    assert recipe_of("embedded-seed1", quick=False) == recipe


def test_objects_are_turned_and_every_turn_is_a_class():
    images, labels = turned_families(300, seed=4)
    plain, families = procedural_images(300, seed=4), procedural_families(300, seed=4)
    objects = families == FAMILIES.index("objects")
    assert torch.equal(images[~objects], plain[~objects])
    assert sorted(labels[~objects].unique().tolist()) == [0, 1, 2] and set(labels[objects].tolist()) == {3, 4, 5, 6}
    for row in torch.nonzero(objects).flatten().tolist():
        assert torch.equal(images[row], plain[row].rot90(int(labels[row]) - 3, (1, 2)))


def test_studies_know_them_and_audits_do_not(folder, tmp_path, capsys, monkeypatch):
    assert base_of("embedded-seed1", CPU, quick=True).spec == "embedded-seed1"
    assert base_of("embedded", CPU).notes == load_base("embedded").notes
    assert main(["audit", str(tmp_path), "--out", str(tmp_path / "out"), "--base", "embedded-seed1"]) == 2
    assert "unknown base 'embedded-seed1'" in capsys.readouterr().err
    monkeypatch.setattr(questions, "registry", lambda: {"transfer": Squares()})
    study = ["study", "transfer", "--quick", "--out", str(tmp_path / "out")]
    assert main([*study, "--base", "embedded-seed1"]) == 0
