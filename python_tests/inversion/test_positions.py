"""Free positions: the tokens of freed images, the places that fit tokens, and searches that only they free."""

from dataclasses import replace

import pytest
import torch
from cases import target_of
from gauss_newton_cases import NAMES
from torch import nn
from vit_cases import small_vit, smooth_images

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.inversion import descents, side_by_side
from r2f_ext.inversion import positions as module
from r2f_ext.inversion.gauss_newton import _task_of, free_positions
from r2f_ext.inversion.linearisation import Axes
from r2f_ext.inversion.patches import fold_patches, unfold_patches
from r2f_ext.inversion.positions import FreePositions
from r2f_ext.inversion.side_by_side import Kind, next_kind, search_together
from r2f_ext.inversion.task import Freed, GaussNewtonConfig
from r2f_ext.inversion.update_map import Subspace, UpdateMap, flat_units
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.types import BaseModel

SHAPE, SIZE, GRID = torch.Size((3, 16, 16)), (4, 4), (4, 4)
# Patches 5, 6, 9 and 10 have changed places in a circle, 0 and 15 with each other.
ORDER = torch.tensor([15, 1, 2, 3, 4, 6, 10, 7, 8, 5, 9, 11, 12, 13, 14, 0])


def every_direction():
    """All pixels vary alike."""
    return 0.2 * torch.eye(SHAPE.numel(), dtype=torch.float64)


def tokens_of(base, images):
    """[n, N, d]: what block 0 reads, without the class token."""
    return base.model._pos_embed(base.model.patch_embed(base.normalize(images)))[:, 1:]


def reordered(image):
    """The image [p] with its patches in ORDER."""
    return fold_patches(unfold_patches(image.view(1, *SHAPE), SIZE)[:, ORDER], SIZE, GRID).flatten()


def with_tokens(free, tokens):
    """A freed image [p'] with these tokens [N, d]: contents first, then extra numbers for what is left."""
    wanted = tokens - free.positions
    contents = wanted @ torch.linalg.pinv(free.weight @ free.contents).T @ free.contents.T
    left = wanted - contents @ free.weight.T
    extras = left @ torch.linalg.pinv(free.extra).T + 0.5
    channels = free.base.input_shape[0] - 3
    parts = torch.cat([contents.unflatten(1, (3, *SIZE)), extras.unflatten(1, (channels, *SIZE))], dim=1)
    return fold_patches(parts.flatten(1)[None], SIZE, GRID).flatten()


@pytest.fixture(scope="module")
def free():
    return FreePositions.of(small_vit(), SHAPE, every_direction())


def test_the_model_reads_an_image_as_before_if_its_positions_are_its_own(free):
    base, images = small_vit(), smooth_images(2, 16).double()
    freed = free.freed(images.flatten(1)).view(2, *free.base.input_shape)
    assert free.base.input_shape == (4, 16, 16)
    torch.testing.assert_close(free.base.model(free.base.normalize(freed)), base.model(base.normalize(images)))
    assert base.model.patch_embed.proj.weight.shape[1] == 3  # the base itself is not touched


def test_each_extra_number_moves_one_token_out_of_reach_of_pixels(free):
    images = smooth_images(1, 16).double().flatten(1)
    still = free.freed(images)
    directions = free.basis[:, SHAPE.numel() :].T
    assert len(directions) == 16 * 15  # 16 positions differ along 15 axes
    for number in (0, 17, 239):
        both = torch.cat([still, still + directions[number]]).view(2, *free.base.input_shape)
        before, after = tokens_of(free.base, both)
        moved = after - before
        assert moved.norm(dim=1).nonzero().flatten().tolist() == [number // 15]
        assert (free.weight.T @ moved.T).abs().max() < 1e-9 * moved.norm()


def test_one_unit_along_an_axis_is_a_share_of_what_two_positions_differ_by(free):
    rest = free.positions - module._onto(free.weight @ free.contents, free.positions)
    differences = (rest[:, None] - rest).flatten(0, 1)
    still = free.freed(smooth_images(1, 16).double().flatten(1))
    freed = torch.cat([still, still + free.basis[:, SHAPE.numel() : SHAPE.numel() + 15].T])
    tokens = tokens_of(free.base, freed.view(16, *free.base.input_shape))[:, 0]
    moved = tokens[1:] - tokens[0]
    along = differences @ torch.nn.functional.normalize(moved, dim=1).T
    torch.testing.assert_close(moved.norm(dim=1), module.STEP * along.square().mean(0).sqrt())


def test_tokens_in_another_order_are_put_in_their_places(free):
    image = smooth_images(1, 16).double()
    tokens = unfold_patches(image, SIZE)[0] @ free.weight.T + free.positions
    constant = tokens_of(small_vit(), image)[0] - tokens  # the bias and the mean of pixels, alike for every patch
    torch.testing.assert_close(constant, constant[:1].expand(16, -1))
    freed = with_tokens(free, tokens[ORDER])
    assert (freed[: SHAPE.numel()] - image.flatten()).abs().max() > 0.1
    torch.testing.assert_close(free.placed(freed[None])[0], image.flatten(), atol=1e-8, rtol=0)
    own = free.freed(image.flatten(1))
    torch.testing.assert_close(free.placed(own), image.flatten(1), atol=1e-8, rtol=0)


def test_a_channel_that_never_varies_stays_as_it_is():
    """A blue channel of 0.3 everywhere, of which no search coordinate knows."""
    free, image = FreePositions.of(small_vit(), SHAPE, every_direction()[:, :512]), smooth_images(1, 16).double()
    assert free.contents.shape == (48, 32)
    image[:, 2], blue = 0.3, torch.zeros_like(image)
    blue[:, 2] = 0.3
    tokens = unfold_patches(image, SIZE)[0] @ free.weight.T + free.positions
    freed = with_tokens(free, tokens[ORDER] - unfold_patches(blue, SIZE)[0] @ free.weight.T)
    freed = freed.view(1, *free.base.input_shape)
    freed[:, 2] = 0.3
    seen = tokens_of(free.base, freed)[0] - tokens_of(small_vit(), image)[0]
    torch.testing.assert_close(seen, tokens[ORDER] - tokens)  # the image's own tokens in another order
    torch.testing.assert_close(free.placed(freed.flatten(1))[0], image.flatten(), atol=1e-8, rtol=0)


def test_tokens_that_are_not_finite_are_no_error(free):
    assert free.placed(free.freed(torch.full((1, SHAPE.numel()), torch.nan, dtype=torch.float64))).isnan().all()


def test_of_gray_images_patches_stay_gray():
    gray = torch.eye(256, dtype=torch.float64).repeat(3, 1)
    free = FreePositions.of(small_vit(), SHAPE, gray)
    assert free.contents.shape == (48, 16)
    images = smooth_images(1, 16).double().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    placed = free.placed(free.freed(images.flatten(1)) + 0.05 * free.basis.sum(1))
    assert (placed.view(3, 256) - placed.view(3, 256).mean(0)).abs().max() < 1e-9


def test_extra_numbers_are_as_few_as_they_may_be(monkeypatch):
    monkeypatch.setattr(module, "MOST_OF_ALL", 16 * 5)
    free = FreePositions.of(small_vit(), SHAPE, every_direction())
    assert free.basis.shape == (4 * 256, 768 + 16 * 5)
    assert free.extra[:, :5].norm(dim=0).min() > 0 and not free.extra[:, 5:].any()


@pytest.mark.parametrize(
    "model",
    [
        nn.Flatten(),
        nn.Conv2d(3, 8, 3),
        small_vit(pos_embed="none").model,
        small_vit(embed_dim=48).model,  # contents reach every token
    ],
)
def test_where_tokens_do_not_show_their_positions_none_are_free(model):
    base = BaseModel(model, "other", tuple(SHAPE), (0.5,) * 3, (0.5,) * 3, 10)
    assert FreePositions.of(base, SHAPE, every_direction()) is None


@pytest.fixture(scope="module")
def problem():
    """A task with free positions, and the image of its one victim."""
    base = small_vit(depth=2)
    unfuse_attention(base.model)
    target = target_of(base, NAMES, rank=8)
    torch.manual_seed(0)
    a = {one.name: torch.rand(8, one.d_in, dtype=torch.float64) / one.d_in**0.5 for one in target.layers}
    images, labels = smooth_images(1, 16).double(), torch.tensor([3])
    with Capture(target) as capture:
        observed = flat_units(project(target, capture(images[:, None], labels[:, None]), a))
    updates = UpdateMap(target, a, SHAPE, 32)
    positions = free_positions(updates, Subspace(every_direction()))
    own = _task_of(updates.on(positions.base), observed, labels, Subspace(positions.basis))
    task = _task_of(updates, observed, labels, Subspace(every_direction()))
    return replace(task, freed=Freed(positions, own)), images.flatten()


def after_one_pass(task, start, kind):
    axes, config = [Axes.of(task.subspace.basis)], GaussNewtonConfig(passes=1)
    ((_, found),) = search_together(task, start[None], config, axes, 1, lambda *_: kind, restarts=False)
    return found


def test_a_search_that_begins_with_six_patches_out_of_place_finds_the_image_only_with_free_positions(problem):
    task, image = problem
    freed, descended = (after_one_pass(task, reordered(image), kind) for kind in (Kind.FREED, Kind.DESCENT))
    errors = [(found.image - image).square().mean().sqrt() for found in (freed, descended)]
    assert errors[0] < 0.01 and errors[1] > 0.05


def test_a_pass_with_free_positions_never_raises_the_misfit(problem, monkeypatch):
    """Where the places found are wrong, the search goes on from where it was."""
    task, image = problem
    monkeypatch.setattr(descents, "FREED_STAGES", ((1e-5, 1),))
    monkeypatch.setattr(descents, "PLACED_STAGES", ((1e-4, 1),))
    start, places = (image + 0.01).clamp(0, 1), FreePositions.placed
    for placed, kept in ((lambda self, freed: 1 - freed[:, : SHAPE.numel()], True), (places, False)):
        monkeypatch.setattr(FreePositions, "placed", placed)
        rows = torch.tensor([0])
        values = task.update_of(start[None], rows)
        (reached,), _, (ended,) = descents.freed_descents(task, rows, start[None], values, [None])
        assert torch.equal(reached, start) == kept and (kept or ended is None)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_free_positions_go_on_far_below_the_residual_of_the_wrong_order(problem, monkeypatch, noise):
    """Each victim to a twentieth of its own residual, or to where Newton's steps take over, or to the noise."""
    task, image = problem
    task, starts = replace(task, noise=noise), torch.stack([(image + 1e-3).clamp(0, 1), 1 - image])
    own = replace(task.freed.task, slopes_of=lambda points, _: (torch.zeros(len(points)), None))
    task = replace(task, observed=task.observed.expand(2, -1), freed=replace(task.freed, task=own))
    rows, limits = torch.arange(2), []

    def seen(slopes_of, points, grams, basis, dampings, enough, evaluations):
        limits.append(enough)
        return points

    monkeypatch.setattr(descents, "preconditioned_descent", seen)
    one_label = replace(task, update_of=lambda images, _: task.update_of(images, torch.zeros(len(images)).long()))
    values = one_label.update_of(starts, rows)
    monkeypatch.setattr(descents, "_grams", lambda task, rows, points, *_: torch.eye(3).expand(len(rows), 3, 3))
    descents.freed_descents(one_label, rows, starts, values, [None, None])
    near, far = one_label.residuals(values, rows)
    assert 0.05 * far > (2 * task.handed_over / task.layers) ** 0.5 > 0.05 * near
    expected = [task.layers * ((0.05 * near) ** 2 + noise**2) / 2, task.handed_over]
    assert len(limits) == 4 and all(each.tolist() == pytest.approx(expected) for each in limits)


@pytest.mark.parametrize("ends", [False, True])
def test_where_a_pass_brings_nothing_the_next_one_goes_on_from_its_end(problem, monkeypatch, ends):
    """With a Jacobian there, unless its descent had ended; after a pass that brings something, from the point again."""
    task, image = problem
    own = replace(task.freed.task, slopes_of=lambda points, _: (torch.full((len(points),), 0.0 if ends else 1.0), None))
    task = replace(task, freed=replace(task.freed, task=own))
    positions, began, jacobians = task.freed.positions, [], []
    start, closer = ((image + error).clamp(0, 1)[None] for error in (0.01, 0.004))

    def softened(task, rows, points, *_):
        began.extend(points if task is own else ())
        return points + 0.001 if task is own else points

    def grams(task, rows, points, *_):
        jacobians.extend(points if task is own else ())

    monkeypatch.setattr(descents, "_softened", softened)
    monkeypatch.setattr(descents, "_grams", grams)
    monkeypatch.setattr(FreePositions, "placed", lambda self, freed: 1 - freed[:, : SHAPE.numel()])
    monkeypatch.setattr(
        side_by_side, "newton_steps", lambda task, rows, *_, config: (closer, task.update_of(closer, rows))
    )
    kinds = iter([Kind.FREED, Kind.FREED, Kind.NEWTON, Kind.FREED])
    config, axes = GaussNewtonConfig(passes=4), [Axes.of(task.subspace.basis)]
    list(search_together(task, start, config, axes, 1, choose=lambda *_: next(kinds)))
    first, later = positions.freed(start)[0], positions.freed(closer)[0]
    torch.testing.assert_close(torch.stack(began), torch.stack([first, first if ends else first + 0.001, later]))
    torch.testing.assert_close(torch.stack(jacobians), torch.stack(began))


def test_where_the_patch_embedding_is_adapted_or_a_point_is_two_images_nothing_is_free():
    """The update of a patch embedding depends on the pixels of each patch."""
    base = small_vit()
    target = target_of(base, ("blocks.0.attn.qkv", "patch_embed.proj"), rank=4)
    updates = UpdateMap(target, {each.name: torch.zeros(4, each.d_in).double() for each in target.layers}, SHAPE, 32)
    assert free_positions(updates, Subspace(every_direction())) is None
    target = target_of(base, ("blocks.0.attn.qkv",), rank=4)
    updates = UpdateMap(target, updates.a, SHAPE, 32)
    assert free_positions(updates, Subspace(every_direction())) is not None
    assert free_positions(updates, Subspace(torch.block_diag(every_direction(), every_direction()))) is None


def test_positions_are_freed_where_descent_or_newton_stalls():
    kinds, last, before = [], None, torch.inf
    for residual in (0.5, 0.05, 0.049, 0.02, 0.019, 0.0189, 0.005, 0.0049, 0.0048, 0.001):
        last, before = next_kind(last, before, residual, frees=True), residual
        kinds.append(last.value)
    expected = "descent descent freed descent freed cloud newton freed newton newton"
    assert kinds == expected.split()
