"""Exchanges of patches: the images they make, and searches that only they get out of a wrong place."""

import pytest
import torch
from cases import target_of
from gauss_newton_cases import NAMES
from torch import nn
from vit_cases import small_vit, smooth_images

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.inversion import exchange as module
from r2f_ext.inversion.exchange import APART, Patches, exchanged_descent
from r2f_ext.inversion.gauss_newton import _task_of
from r2f_ext.inversion.linearisation import Axes
from r2f_ext.inversion.patches import fold_patches, unfold_patches
from r2f_ext.inversion.side_by_side import Kind, next_kind, search_together
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.inversion.update_map import Subspace, UpdateMap, flat_units
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.types import BaseModel

SHAPE, SIZE, GRID = torch.Size((3, 16, 16)), (4, 4), (4, 4)


def every_direction():
    """All pixels vary alike."""
    return 0.2 * torch.eye(SHAPE.numel(), dtype=torch.float64)


def image_of(patches):
    return fold_patches(patches[None], SIZE, GRID).flatten()


def test_the_token_of_a_moved_patch_is_what_it_was_as_nearly_as_images_allow():
    base = small_vit()
    embed, positions = base.model.patch_embed, base.model.pos_embed[0, 1:]

    def tokens(image):
        return embed(base.normalize(image.view(1, *SHAPE)))[0] + positions

    patches = unfold_patches(smooth_images(1, 16).double(), SIZE)[0]
    found = Patches.of(base, SHAPE, every_direction()).exchanged(image_of(patches))
    assert found.shape == (16 * 15 // 2, SHAPE.numel())
    image, (one, other) = found[20], torch.triu_indices(16, 16, 1)[:, 20].tolist()
    rest = [place for place in range(16) if place not in (one, other)]
    moved = unfold_patches(image.view(1, *SHAPE), SIZE)[0]
    torch.testing.assert_close(moved[rest], patches[rest])
    before, after = tokens(image_of(patches)), tokens(image)
    weight = embed.proj.weight.flatten(1)  # what no image can make up for is orthogonal to its columns
    for here, there in ((one, other), (other, one)):
        left = after[there] - before[here]
        assert (weight.T @ left).abs().max() < 1e-7 * weight.norm() * left.norm()
        assert left.norm() < (positions[one] - positions[other]).norm()


def test_of_gray_images_the_shifts_are_gray():
    gray = torch.eye(256, dtype=torch.float64).repeat(3, 1)
    shifts = Patches.of(small_vit(), SHAPE, gray).shifts.unflatten(2, (3, 16))
    assert shifts.abs().max() > 0 and (shifts - shifts.mean(2, keepdim=True)).abs().max() < 1e-12


def test_patches_that_are_alike_are_not_exchanged():
    patches = torch.full((16, 48), 0.5, dtype=torch.float64)
    patches[3] += 2 * APART
    patches[7] += 0.5 * APART
    found = Patches.of(small_vit(), SHAPE, every_direction()).exchanged(image_of(patches))
    assert len(found) == 15  # of patch 3 with any other
    assert len(Patches.of(small_vit(), SHAPE, every_direction()).exchanged(torch.full((768,), 0.5).double())) == 0


def test_of_many_exchanges_some_from_the_whole_list_are_tried(monkeypatch):
    patches, image = Patches.of(small_vit(), SHAPE, every_direction()), smooth_images(1, 16).double().flatten()
    every = patches.exchanged(image)
    monkeypatch.setattr(module, "MOST", 7)
    some = patches.exchanged(image)
    assert len(every) == 120 and len(some) == 7
    assert torch.equal(some[0], every[0]) and torch.equal(some[-1], every[-1])


def test_an_image_of_one_tone_goes_on_without_exchanges():
    gray, seen = torch.full((768,), 0.5, dtype=torch.float64), []

    def slopes_of(images, _):
        seen.append(len(images))
        return (images - 0.6).square().sum(1) / 2, images - 0.6

    basis = every_direction()
    patches = Patches.of(small_vit(), SHAPE, basis)
    misfits_of = lambda images: (images - 0.6).square().sum(1)  # noqa: E731
    found = exchanged_descent(patches, slopes_of, misfits_of, gray, 0.04 * torch.eye(768).double(), basis, 0.0)
    assert set(seen) == {1} and (found - 0.6).abs().max() < 1e-6


@pytest.mark.parametrize("model", [nn.Flatten(), nn.Conv2d(3, 8, 3)])
def test_a_model_without_patches_has_no_exchanges(model):
    base = BaseModel(model, "other", tuple(SHAPE), (0.5,) * 3, (0.5,) * 3, 10)
    assert Patches.of(base, SHAPE, every_direction()) is None


def test_a_search_that_begins_with_two_patches_exchanged_finds_the_image_only_by_exchanging():
    base = small_vit(depth=2)
    unfuse_attention(base.model)
    target = target_of(base, NAMES, rank=8)
    torch.manual_seed(0)
    a = {one.name: torch.rand(8, one.d_in, dtype=torch.float64) / one.d_in**0.5 for one in target.layers}
    images, labels = smooth_images(1, 16).double(), torch.tensor([3])
    with Capture(target) as capture:
        observed = flat_units(project(target, capture(images[:, None], labels[:, None]), a))
    patches = unfold_patches(images, SIZE)[0]
    swapped = patches.clone()
    swapped[[5, 10]] = patches[[10, 5]]
    subspace = Subspace(every_direction())
    start, axes = image_of(swapped)[None], [Axes.of(subspace.basis)]
    task = _task_of(UpdateMap(target, a, SHAPE, 32), observed, labels, subspace, descends=True)
    assert task.patches is not None
    errors = {}
    for name, kind in (("exchange", Kind.EXCHANGE), ("descent", Kind.DESCENT)):
        choose = lambda last, before, residual, kind=kind: kind  # noqa: E731
        config = GaussNewtonConfig(passes=1)
        ((_, found),) = search_together(task, start, config, axes, 1, choose, restarts=False)
        errors[name] = (found.image - images.flatten()).square().mean().sqrt()
    assert errors["exchange"] < 0.01 < 5 * errors["exchange"] < errors["descent"]


def test_exchanges_follow_where_descent_or_newton_stalls():
    kinds, last, before = [], None, torch.inf
    for residual in (0.5, 0.05, 0.049, 0.02, 0.019, 0.0189, 0.005, 0.0049, 0.0048, 0.001):
        last, before = next_kind(last, before, residual, True, exchanges=True), residual
        kinds.append(last.value)
    expected = "descent descent exchange descent exchange cloud newton exchange newton newton"
    assert kinds == expected.split()
