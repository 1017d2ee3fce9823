"""The demo's victims are PEFT's own, whole or not there."""

import json

import pytest
import torch
from cases import CONFIG, WEIGHTS, peft_factors, peft_model, train
from safetensors.torch import load_file

from r2f_ext.audit import victims
from r2f_ext.audit.victims import TARGET_MODULES, VictimConfig, train_victim, train_victims
from r2f_ext.errors import R2FError
from r2f_ext.models import attach, read_adapter


def test_the_default_victim_is_the_protocols(tmp_path, embedded, private):
    image, label = private.batch([0])[0], int(private.labels[0])
    folder = train_victim(embedded, image, label, tmp_path / "v", VictimConfig())
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.0)
    assert sorted(config["target_modules"]) == sorted(TARGET_MODULES)
    target, update = attach(read_adapter(folder), embedded)
    assert len(target.layers) == 16
    model = peft_model(embedded, target_modules=list(TARGET_MODULES))
    train(model, embedded, image[None], torch.tensor([label]), lr=0.1)
    for name in target.names:
        a, b, _ = peft_factors(model, name)
        assert torch.equal(update.a[name], a)
        torch.testing.assert_close(update.b[name], b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-12)


def test_victims_share_a_start_and_differ_in_b(tmp_path, embedded, private):
    folders = train_victims(embedded, private.batch([0, 1]), private.labels[:2], tmp_path, VictimConfig(seed=3))
    assert [f.name for f in folders] == ["000", "001"]
    first, second = (load_file(f / WEIGHTS) for f in folders)
    assert all(torch.equal(first[n], second[n]) for n in first if "lora_A" in n)
    assert not any(torch.equal(first[n], second[n]) for n in first if "lora_B" in n)
    assert not list(tmp_path.glob(".*"))


def test_the_random_state_of_the_caller_is_left_alone(tmp_path, embedded, private):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train_victim(embedded, private.batch([0])[0], 1, tmp_path / "v", VictimConfig())
    assert torch.equal(torch.rand(3), expected)


def test_more_steps_move_a(tmp_path, embedded, private):
    image, label = private.batch([0])[0], int(private.labels[0])
    paths = [train_victim(embedded, image, label, tmp_path / str(n), VictimConfig(steps=n)) for n in (1, 3)]
    first, second = (load_file(p / WEIGHTS) for p in paths)
    assert not any(torch.equal(first[n], second[n]) for n in first if "lora_A" in n)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_save_that_fails_leaves_nothing(tmp_path, embedded, private, monkeypatch, error):
    real = victims.get_peft_model

    def failing(*args):
        model = real(*args)

        def save(folder, **options):
            type(model).save_pretrained(model, folder)
            raise error

        model.save_pretrained = save
        return model

    monkeypatch.setattr(victims, "get_peft_model", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else R2FError):
        train_victim(embedded, private.batch([0])[0], 1, tmp_path / "v", VictimConfig())
    assert list(tmp_path.iterdir()) == []


def test_an_older_victim_is_replaced(tmp_path, embedded, private):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "old").write_text("x")
    train_victim(embedded, private.batch([0])[0], 1, tmp_path / "v", VictimConfig())
    assert not (tmp_path / "v" / "old").exists() and (tmp_path / "v" / WEIGHTS).exists()
