"""The update as a function of the image: derivatives against differences and the definition."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from emulated_graphs import emulated_graphs
from gauss_newton_cases import SHAPE, small_problem

from r2f_ext.errors import R2FError
from r2f_ext.inversion import update_map
from r2f_ext.inversion.update_map import BOX_PENALTY, Subspace, UpdateMap, few_sizes, flat_units


@pytest.fixture(scope="module")
def problem():
    return small_problem()


def test_jacobian_equals_central_differences(problem):
    target, a, _, images, labels, subspace = problem
    updates = UpdateMap(target, a, SHAPE, directions=64)
    point, step = images[0].flatten(), 1e-6
    found = updates.jacobian(point, labels[:1], subspace.basis)
    columns = subspace.basis.T
    ahead, behind = updates(point + step * columns, labels[:1]), updates(point - step * columns, labels[:1])
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)


def test_the_slopes_of_the_misfits_are_the_jacobians_times_the_errors(problem):
    """Of two images of their own labels, one of them outside the box."""
    target, a, observed, images, labels, subspace = problem
    updates, wanted = UpdateMap(target, a, SHAPE, 64), flat_units(observed)
    points = images.flip(0).flatten(1).clone()
    points[1] += 0.4
    losses, slopes = updates.slopes(points, labels, wanted)
    for victim, (point, label) in enumerate(zip(points, labels, strict=True)):
        error, outside = updates(point[None], label[None])[0] - wanted[victim], point - point.clamp(0, 1)
        torch.testing.assert_close(losses[victim], error.square().sum() / 2 + BOX_PENALTY / 2 * outside.square().sum())
        expected = updates.jacobian(point, label[None], subspace.basis) @ error + BOX_PENALTY * outside @ subspace.basis
        torch.testing.assert_close(slopes[victim] @ subspace.basis, expected, rtol=1e-6, atol=1e-9)
    assert (points[1] > 1).any() and (points[0] <= 1).all()


def test_images_of_several_labels_are_mapped_as_one_by_one_and_in_batches(problem):
    target, a, _, images, labels, _ = problem
    points = images.flatten(1)
    whole = UpdateMap(target, a, SHAPE, 64)(points, labels)
    torch.testing.assert_close(UpdateMap(target, a, SHAPE, 1)(points, labels), whole)
    for victim in range(2):
        rows = slice(victim, victim + 1)
        torch.testing.assert_close(UpdateMap(target, a, SHAPE, 64)(points[rows], labels[rows])[0], whole[victim])


def test_nothing_is_searched_where_no_proxy_varies():
    proxies = torch.rand(50, 3, 8, 8)
    proxies[:, :, :2] = 0.25
    basis = Subspace.of(proxies).basis.unflatten(0, (3, 8, 8))
    assert basis.shape[-1] <= 49 and basis[:, :2].abs().max() < 1e-5
    assert basis[:, 2:].abs().max() > 1e-2


def test_proxies_all_alike_are_refused():
    with pytest.raises(R2FError, match="all alike"):
        Subspace.of(torch.full((5, 3, 4, 4), 0.5))


def test_large_images_are_refused():
    with pytest.raises(R2FError, match="150528 numbers"):
        Subspace.of(torch.rand(2, 3, 224, 224))


def test_batches_are_filled_up_to_few_sizes_from_one_victim_on():
    filled = [few_sizes(count) for count in range(1, 129)]
    assert sorted(set(filled)) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert all(count <= size < 1.25 * count + 1 for count, size in enumerate(filled, start=1))


def test_passes_that_are_captured_give_what_calls_give(problem, device, monkeypatch):
    """Values of one image, of a few and of more than are captured, tangents and slopes; on a CPU in emulation."""
    target, a, observed, images, labels, subspace = problem
    monkeypatch.setattr(update_map, "GRAPH_IMAGES", 4)
    wanted, points = flat_units(observed), images.flip(0).flatten(1)
    several, their_labels = points.repeat(5, 1)[:9] * torch.linspace(0.5, 1, 9)[:, None].double(), labels.repeat(5)[:9]
    counts = (1, 3, 4, 9, 3)
    expected = UpdateMap(target, a, SHAPE, 64)
    values = expected(several, their_labels)
    slopes, jacobian = expected.slopes(points, labels, wanted), expected.jacobian(points[0], labels[:1], subspace.basis)
    moved = replace(target, base=replace(target.base, model=copy.deepcopy(target.base.model).to(device)))
    updates = UpdateMap(moved, {name: each.to(device) for name, each in a.items()}, SHAPE, 64)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
    with emulated_graphs() if device.type == "cpu" else nullcontext():
        found = [updates(several[:count].to(device), their_labels[:count].to(device)) for count in counts]
        for count in (1, 2):
            given = (each[:count].to(device) for each in (points, labels, wanted))
            for one, other in zip(updates.slopes(*given), slopes, strict=True):
                close(one.cpu(), other[:count])
        along = updates.jacobian(points[0].to(device), labels[:1].to(device), subspace.basis.to(device))
    for count, own in zip(counts, found, strict=True):  # compared last: no call overwrote the values of another
        close(own.cpu(), values[:count])
    close(along.cpu(), jacobian)
    sizes = {key[0][0][0] for key in updates._values._captures}
    assert sizes == {1, 4}
    for replayed in (updates._values, updates._slopes, updates._tangents):
        assert replayed._captures and None not in replayed._captures.values()


def test_the_map_for_another_base_is_made_once(problem):
    target, a, *_ = problem
    updates, base = UpdateMap(target, a, SHAPE, 64), copy.copy(target.base)
    assert updates.on(base) is updates.on(base) and updates.on(base).target.base is base
