"""Adapters that differ in what one target cannot express are refused by name; private images in the right order."""

from dataclasses import replace

import pytest
import torch
from cases import changed_config, changed_weights, tiny_base, with_patches_and_positions
from safetensors.torch import load_file

from r2f_ext.audit.inputs import load_adapters, load_private, pair_up
from r2f_ext.data import load_images
from r2f_ext.errors import R2FError
from r2f_ext.inversion.route import adapter_problem
from r2f_ext.inversion.routes import run_routes, verdicts_of
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


def with_head(folder, to, embedded, moved=0.0, **fields):
    """A copy of an adapter folder with a head in the file: the base's, moved by random numbers of that size."""
    torch.manual_seed(4)
    head = {
        f"base_model.model.head.{n}": p + moved * torch.randn_like(p) for n, p in embedded.model.head.named_parameters()
    }
    changed = changed_config(folder, to.with_name(to.name + "-config"), modules_to_save=["head"], **fields)
    return changed_weights(changed, to, lambda w: {**w, **head})


def test_every_adapter_has_its_own_trained_head(adapter_folder, embedded, tmp_path):
    """The heads began at the base's, so each one's change is a gradient of its own."""
    one = with_head(adapter_folder, tmp_path / "one", embedded, 0.01)
    two = with_head(adapter_folder, tmp_path / "two", embedded, 0.02)
    loaded = load_adapters([one, two], embedded)
    assert loaded.target.layer("head").saved
    torch.testing.assert_close(loaded.updates[1].b["head"], 2 * loaded.updates[0].b["head"], rtol=1e-3, atol=1e-5)
    assert all(any("weight of head is in the file" in said for said in one.leaks) for one in loaded.facts)


def test_a_head_in_one_adapter_only_is_refused(adapter_folder, embedded, tmp_path):
    trained = with_head(adapter_folder, tmp_path / "one", embedded, 0.01)
    untrained = with_head(adapter_folder, tmp_path / "two", embedded)
    for other in (adapter_folder, untrained):
        for folders in ([trained, other], [other, trained]):
            with pytest.raises(R2FError, match="differ in the saved module head, which only one of them holds trained"):
                load_adapters(folders, embedded)
    assert len(load_adapters([untrained, adapter_folder], embedded).updates) == 2


def test_heads_of_unknown_start_must_be_the_same(adapter_folder, embedded, tmp_path):
    one = with_head(adapter_folder, tmp_path / "one", embedded, 5.0)
    two = changed_weights(one, tmp_path / "two", lambda w: {k: v + ("head.bias" in k) for k, v in w.items()})
    assert not load_adapters([one, one], embedded).target.layers[-1].saved
    for folders in ([one, two], [one, adapter_folder]):
        with pytest.raises(R2FError, match=r"differ in head\.\w+, whose start the base does not hold"):
            load_adapters(folders, embedded)


def test_other_precisions_and_scalings_are_refused(adapter_folder, embedded, tmp_path):
    half = changed_weights(adapter_folder, tmp_path / "h", lambda w: {k: v.bfloat16() for k, v in w.items()})
    with pytest.raises(R2FError, match=r"differ in stored precision \(float32 and bfloat16\): audit them one by one"):
        load_adapters([adapter_folder, half], embedded)
    slow = changed_config(adapter_folder, tmp_path / "rs", use_rslora=True)
    with pytest.raises(R2FError, match=rf"differ in the scale of {LAYER} \(2 and 5.65685\)"):
        load_adapters([adapter_folder, slow], embedded)


def test_patches_and_positions_saved_together_are_a_closed_form(adapter_folder, embedded, private, tmp_path):
    image, label = private.batch([0]), private.labels[:1]
    folder = with_patches_and_positions(adapter_folder, tmp_path / "a", embedded, image, label)
    loaded = load_adapters([folder], embedded)
    assert "the route patch_position solves" in loaded.facts[0].leaks[-1]
    problem = adapter_problem(loaded.target, loaded.updates, facts=loaded.facts)
    outcome = run_routes(problem, verdicts_of(problem), ["patch_position"])
    error = float((outcome.reconstructions[0].images - image).square().mean())
    assert error < 1e-3  # 30 dB: the changes are stored beside weights a thousand times larger
    plain = load_adapters([adapter_folder], embedded)
    assert not any("patch_position" in said for said in plain.facts[0].leaks)
    problem = adapter_problem(plain.target, plain.updates)
    assert list(run_routes(problem, verdicts_of(problem), ["patch_position"]).not_run) == ["patch_position"]


def test_private_images_by_index(embedded):
    whole = load_images("embedded", role="private")
    one = load_private("embedded:3", embedded, 0, 1)
    assert torch.equal(one.images, whole.images[3:4]) and one.name == "embedded:3" and one.in_order
    several = load_private("embedded:4,0,4", embedded, 0, 3)
    assert torch.equal(several.images, whole.images[[4, 0, 4]])
    assert torch.equal(load_private("embedded", embedded, 0, 5).images, whole.images)
    for spec, adapters, words in [
        ("embedded:100", 1, "has 100 images, counted from 0"),
        ("embedded:1,100", 2, "has 100 images, counted from 0"),
        ("embedded:3", 2, "names 1 images for 2 adapters"),
        ("embedded:3,1,2", 2, "names 3 images for 2 adapters"),
        ("embedded:3,", 1, "unknown images 'embedded:3,'"),
        ("embedded:-1", 1, "unknown images"),
    ]:
        with pytest.raises(R2FError, match=words):
            load_private(spec, embedded, 0, adapters)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_the_order_of_files_need_not_be_that_of_adapters(order, private):
    paired = pair_up(private, (private.batch(order) + 0.05).clamp(0, 1))
    assert torch.equal(paired.originals.images, private.images[order]) and paired.matched
    changed = "left both in the given order" if order == [0, 1, 2] else "changed their order"
    assert changed in paired.sentence and "flatters" in paired.sentence and "--private DATA:INDEX" in paired.sentence


def test_the_best_of_more_images_is_each_ones(private):
    paired = pair_up(private, private.batch([2, 0]) + 0.01)
    assert torch.equal(paired.originals.images, private.images[[2, 0]]) and paired.matched
    assert paired.sentence.startswith("Each of 2 adapters was matched to the one of 3 private images")
    single = pair_up(private, private.batch([1]))
    assert torch.equal(single.originals.images, private.images[[1]]) and single.matched


def test_a_named_order_is_kept_and_one_image_is_no_choice(private):
    named = replace(private, in_order=True)
    paired = pair_up(named, private.batch([2, 0, 1]))
    assert torch.equal(paired.originals.images, private.images) and not paired.matched
    alone = pair_up(private.take(torch.tensor([1])), private.batch([0]))
    assert not alone.matched and alone.sentence == "One adapter is scored against the one private image."


def test_no_adapter_for_this_base(adapter_folder):
    with pytest.raises(R2FError, match="does not fit base 'tiny'"):
        load_adapters([adapter_folder], tiny_base())
