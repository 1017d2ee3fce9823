"""Adapters that differ in what one target cannot express are refused by name; private images in the right order."""

import pytest
import torch
from cases import changed_config, changed_weights, tiny_base
from safetensors.torch import load_file

from r2f_ext.audit.inputs import load_adapters, load_private, pair_up
from r2f_ext.data import load_images
from r2f_ext.errors import R2FError
from r2f_ext.models import attach, read_adapter

LAYER = "blocks.0.attn.qkv"


def test_adapters_of_one_target_come_in_order(adapter_folder, embedded, tmp_path):
    louder = changed_weights(
        adapter_folder, tmp_path / "b", lambda w: {k: 2 * v if "lora_B" in k else v for k, v in w.items()}
    )
    loaded = load_adapters([adapter_folder, louder], embedded)
    target, (first, second) = loaded.target, loaded.updates
    assert target.layers == attach(read_adapter(adapter_folder), embedded)[0].layers
    assert torch.equal(second.b[LAYER], 2 * first.b[LAYER])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lora_alpha": 32}, rf"differ in the scale of {LAYER} \(2 and 4\)"),
        ({"alpha_pattern": {"blocks.2.attn.qkv": 8}}, r"differ in the scale of blocks.2.attn.qkv \(2 and 1\)"),
    ],
)
def test_other_scales_are_refused(fields, sentence, adapter_folder, embedded, tmp_path):
    other = changed_config(adapter_folder, tmp_path / "b", **fields)
    for folders in ([adapter_folder, other], [adapter_folder, adapter_folder, other]):
        with pytest.raises(R2FError, match=f"{sentence}: audit them one by one") as caught:
            load_adapters(folders, embedded)
        assert str(other) in str(caught.value)


def test_other_ranks_and_layers_are_refused(adapter_folder, embedded, tmp_path):
    low = changed_config(adapter_folder, tmp_path / "r", r=4, lora_alpha=8)
    halves = {k: v[:4] if "lora_A" in k else v[:, :4] for k, v in load_file(low / "adapter_model.safetensors").items()}
    low = changed_weights(low, tmp_path / "low", lambda w: {k: v.contiguous() for k, v in halves.items()})
    with pytest.raises(R2FError, match=rf"differ in the rank of {LAYER} \(8 and 4\): audit them one by one"):
        load_adapters([adapter_folder, low], embedded)
    fewer = changed_config(adapter_folder, tmp_path / "f", layers_to_transform=[0], layers_pattern="blocks")
    fewer = changed_weights(fewer, tmp_path / "few", lambda w: {k: v for k, v in w.items() if "blocks.0" in k})
    with pytest.raises(R2FError, match="do not adapt the same layers"):
        load_adapters([adapter_folder, fewer], embedded)


def test_other_heads_are_refused(adapter_folder, embedded, tmp_path):
    head = {f"base_model.model.head.{n}": p.clone() for n, p in embedded.model.head.named_parameters()}
    with_head = changed_config(adapter_folder, tmp_path / "h", modules_to_save=["head"])
    one = changed_weights(with_head, tmp_path / "one", lambda w: {**w, **head})
    moved = {name: tensor + 0.1 for name, tensor in head.items()}
    two = changed_weights(with_head, tmp_path / "two", lambda w: {**w, **moved})
    assert len(load_adapters([one, one], embedded).updates) == 2
    for other in (two, adapter_folder):
        with pytest.raises(R2FError, match=r"differ in the saved module base_model.model.head.bias"):
            load_adapters([one, other], embedded)


def test_private_images_by_index(embedded):
    whole = load_images("embedded", role="private")
    one = load_private("embedded:3", embedded, 0, 1)
    assert torch.equal(one.images, whole.images[3:4]) and one.name == "embedded:3"
    assert torch.equal(load_private("embedded", embedded, 0, 5).images, whole.images)
    with pytest.raises(R2FError, match="has 100 images, counted from 0"):
        load_private("embedded:100", embedded, 0, 1)
    with pytest.raises(R2FError, match="gives 1 images for 2 adapters"):
        load_private("embedded:3", embedded, 0, 2)


def test_as_many_images_keep_their_order_and_more_are_paired(private):
    images = private.batch([2, 0, 1])
    assert pair_up(private, images) is private
    paired = pair_up(private, images[:2] + 0.01)
    assert torch.equal(paired.images, private.images[[2, 0]]) and "flatters" in paired.notes[-1]


def test_no_adapter_for_this_base(adapter_folder):
    with pytest.raises(R2FError, match="does not fit base 'tiny'"):
        load_adapters([adapter_folder], tiny_base())
