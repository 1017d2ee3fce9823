import pytest
import torch

from r2f_ext.errors import R2FError
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.studies import CLOTHES
from r2f_ext.studies.groups import GroupRidge, draw_groups, fitting_groups, group_mean
from r2f_ext.studies.questions.batch import single_updates
from r2f_ext.studies.scene import base_of, public_images, start_of, target_of

CPU = torch.device("cpu")


def scene():
    base = base_of("embedded", CPU)
    target = target_of(base, 4, ["blocks.0.attn.qkv", "blocks.2.mlp.fc2"])
    return target, start_of(target, 0), public_images(base, CLOTHES, 0, 150)


def test_the_update_of_a_batch_is_the_mean_of_its_images_updates():
    target, a, public = scene()
    single = single_updates(target, a, public)
    found = group_mean(single, torch.arange(12).view(4, 3))
    (batch,) = GeneratedPairs(target, a, public, group_size=3).batches(0, 4)
    for name, update in batch.updates.items():
        torch.testing.assert_close(found[name], update.flatten(1), rtol=1e-4, atol=1e-7)


def test_groups_have_the_labels_and_held_out_groups_share_no_image():
    public = torch.arange(10).repeat(40)
    labels = torch.tensor([3, 7, 3, 1])
    rows = fitting_groups(public, labels, 60, torch.Generator().manual_seed(0))
    assert torch.equal(public[rows], labels.expand(60, -1))
    assert all(len(set(row)) == 4 for row in rows.tolist())
    assert not set(rows[:50].flatten().tolist()) & set(rows[50:].flatten().tolist())
    assert torch.equal(public[draw_groups(public, labels, 5, torch.Generator())], labels.expand(5, -1))


def test_images_of_any_label_stand_in_for_a_rare_one_and_too_few_are_refused():
    public = torch.tensor([0, 0, 0, 1])
    rows = draw_groups(public, torch.tensor([1, 1]), 50, torch.Generator().manual_seed(0))
    assert set(rows.flatten().tolist()) == {0, 1, 2, 3}
    with pytest.raises(R2FError, match="4 public images are too few for batches with 5 images of one label"):
        draw_groups(public, torch.zeros(5, dtype=torch.int64), 2, torch.Generator())


def test_groups_of_one_image_give_the_amortised_route():
    target, a, public = scene()
    public = public.relabelled(0)
    single = single_updates(target, a, public)
    fitted = public.take(torch.arange(140))
    asked = {name: each[140:] for name, each in single.items()}
    rows = fitting_groups(fitted.labels, torch.tensor([0]), 1000, torch.Generator())
    ours = GroupRidge(group_mean(single, rows), fitted, rows)(asked)
    inverter = AmortisedInverter(
        {name: each[:140] for name, each in single.items()}, fitted.batch(slice(None)), fitted.labels, 10
    )
    torch.testing.assert_close(ours[:, 0], inverter.invert(asked).images, rtol=1e-3, atol=1e-4)
