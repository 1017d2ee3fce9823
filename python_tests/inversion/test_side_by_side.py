"""Searches that take their passes together: which pass comes next, when they end and begin again."""

from dataclasses import replace

import pytest
import torch
from emulated_graphs import emulated_graphs
from gauss_newton_cases import SHAPE, small_problem, start_near

from r2f_ext.inversion import side_by_side as module
from r2f_ext.inversion.exactness import REPRODUCED
from r2f_ext.inversion.gauss_newton import _task_of
from r2f_ext.inversion.linearisation import Axes
from r2f_ext.inversion.side_by_side import FAR, Kind, next_kind, search_together
from r2f_ext.inversion.task import NEAR, Freed, GaussNewtonConfig
from r2f_ext.inversion.update_map import UpdateMap, flat_units

BETWEEN = (NEAR * FAR) ** 0.5


@pytest.fixture(scope="module")
def problem():
    return small_problem()


def task_of(problem):
    target, a, observed, _, labels, subspace = problem
    return _task_of(UpdateMap(target, a, SHAPE, 32), flat_units(observed), labels, subspace)


def found(problem, distance=1.0, task=None, together=2, **settings):
    """Searches of both victims from starts at a distance."""
    *_, images, labels, subspace = problem
    starts = start_near(images, labels, subspace, distance).images.flatten(1)
    axes = [Axes.of(subspace.basis)] * 2
    ended = dict(search_together(task or task_of(problem), starts, GaussNewtonConfig(**settings), axes, together))
    return [ended[victim] for victim in range(2)]


def kinds(*residuals, frees=False):
    """The kinds of the passes that begin at these residuals, the first of which is a start."""
    last, before, taken = None, torch.inf, []
    for residual in residuals:
        last = next_kind(last, before, residual, frees)
        before = residual
        taken.append(last.value)
    return taken


def test_descent_and_clouds_take_turns_where_passes_stall():
    far = kinds(0.9, 0.5, 0.45, 0.09, 0.085, 0.084)
    assert far == ["descent", "descent", "cloud", "cloud", "descent", "cloud"]
    near = kinds(BETWEEN, 0.5 * NEAR, 0.3 * NEAR, 0.29 * NEAR, 0.2 * NEAR)
    assert near == ["descent", "newton", "newton", "descent", "newton"]
    assert kinds(0.5, torch.nan) == ["descent", "cloud"]


@pytest.mark.parametrize("frees", [False, True])
def test_descent_that_stalls_is_damped_more_before_another_kind_takes_its_place(problem, frees):
    """Unless it stalls where patches can be freed."""
    task, course = task_of(problem), module._Course(None, 0.5, None, None)
    task = replace(task, freed=Freed(None, task) if frees else None)
    seen = []
    for scale in (1.0, 0.1):
        course.kind, course.damping = Kind.DESCENT, module.DAMPING
        for before, residual in ((0.5, 0.3), (0.3, 0.2), (0.2, 0.19), (0.19, 0.18), (0.18, 0.17)):
            course.residual = scale * residual
            module._choose(course, scale * before, lambda *given: next_kind(*given, frees=frees), task)
            seen.append((course.kind.value, round(course.damping, 9)))
            if course.kind is not Kind.DESCENT:
                break
    far = [("descent", 1e-4), ("descent", 1e-5), ("descent", 1e-4), ("descent", 1e-3), ("cloud", 1e-3)]
    near = [("descent", 1e-4), ("descent", 1e-5), ("freed", 1e-4)]
    assert seen == far + (near if frees else far)


def test_searches_whose_passes_are_captured_find_the_same(problem):
    """In emulation: a pass that kept a number of the capture, or a result that a later call overwrites, would not."""
    images = problem[3].flatten(1)
    called = found(problem, 0.3)
    with emulated_graphs() as captures:
        replayed = found(problem, 0.3)
    assert captures and all(captures)
    for image, one, other in zip(images, called, replayed, strict=True):
        assert (one.image - image).abs().max() < 1e-4 and (one.image - other.image).abs().max() < 1e-6
        assert one.passes == other.passes


def test_both_images_are_found_by_descent_and_by_clouds(problem):
    images, task = problem[3].flatten(1), task_of(problem)
    *_, labels, subspace = problem
    starts = start_near(problem[3], labels, subspace, 0.3).images.flatten(1)

    def clouds_and_newton(last, before, residual):
        return Kind.NEWTON if residual < NEAR else Kind.CLOUD

    for choose in (None, clouds_and_newton):
        axes = [Axes.of(subspace.basis)] * 2
        ended = dict(search_together(task, starts, GaussNewtonConfig(), axes, 2, choose))
        for victim, search in ended.items():
            assert search.residual < 1e-5 < search.start_residual and not search.stopped
            assert (search.image - images[victim]).abs().max() < 1e-4


def test_near_is_wider_where_the_update_has_errors():
    assert next_kind(Kind.DESCENT, 1.0, 2 * NEAR, False) is Kind.DESCENT
    assert next_kind(Kind.DESCENT, 1.0, 2 * NEAR, False, near=3 * NEAR) is Kind.NEWTON


def test_a_search_ends_at_the_noise_of_its_update_but_not_before_newtons_steps(problem, monkeypatch):
    """Passes that bring the point to where the residual is the noise, or 1.4 times that."""
    images, task = problem[3].flatten(1), task_of(problem)
    rows = torch.arange(2)
    (first, second) = task.residuals(task.update_of(images + 1e-3, rows), rows)
    kinds = []

    def at_once(kind, task, rows, points, values, config, axes, courses):
        kinds.append(kind)
        return images[rows] + 1e-3, task.update_of(images[rows] + 1e-3, rows)

    monkeypatch.setattr(module, "_moved", at_once)
    noisy = replace(task, noise=max(first, second))
    for search in found(problem, task=noisy, patience=3):
        assert search.passes == 2 and search.noise == noisy.noise and search.improved
    assert kinds == [Kind.DESCENT, Kind.NEWTON]
    above = replace(task, noise=min(first, second) / 1.4)
    assert all(search.passes == 6 for search in found(problem, task=above, patience=3, passes=6))


def test_points_with_errors_are_compared_before_they_are_clamped(problem, monkeypatch):
    """Only near [0, 1], and what is said of the image is its own residual."""
    task, images = task_of(problem), problem[3].flatten(1)
    targets = task.update_of(images - 0.5, torch.arange(2))  # of images whose pixels are partly below 0
    task = replace(task, observed=targets)
    monkeypatch.setattr(module, "_moved", lambda kind, task, rows, *_: (images[rows] - 0.5, targets[rows]))
    for noise, outside in ((0.0, 1.0), (1e-4, 1.0), (1e-4, 0.0)):
        monkeypatch.setattr(module, "OUTSIDE", outside)
        for victim, search in enumerate(found(problem, task=replace(task, noise=noise), passes=2)):
            clamped = (images[victim] - 0.5).clamp(0, 1)
            (own,) = task.residuals(task.update_of(search.image[None], torch.tensor([victim])), torch.tensor([victim]))
            assert search.residual == pytest.approx(own, rel=1e-6)
            if noise and outside:
                assert torch.equal(search.image, clamped)


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 2), (torch.float64, 1)])
def test_no_pass_follows_a_newton_pass_that_precision_ends(problem, monkeypatch, dtype, passes):
    """In float32 one from a solved point, in float64 one to it. The clamped pixels fit the update only up to 5e-5."""
    task, starts = task_of(problem), problem[3].flatten(1).to(dtype)
    observed = task.observed.to(dtype)
    clamped = observed + 5e-5 * (task.layers / observed.shape[1]) ** 0.5
    task = replace(task, observed=observed, update_of=lambda points, rows: clamped[rows])
    kinds = []

    def solved(kind, task, rows, points, values, config, axes, courses):
        kinds.append(kind)
        return points, observed[rows]

    monkeypatch.setattr(module, "_moved", solved)
    axes = [Axes.of(problem[-1].basis)] * 2
    for _, search in search_together(task, starts, GaussNewtonConfig(), axes, 2):
        assert search.passes == passes and search.residual == pytest.approx(5e-5, rel=1e-2)
    assert kinds == [Kind.NEWTON] * passes


def test_searches_count_their_passes_and_stop_at_their_limits(problem):
    assert [search.passes for search in found(problem, passes=1, steps=1)] == [1, 1]
    stopped = found(problem, minutes=0.0)
    assert [(search.passes, search.stopped) for search in stopped] == [(0, True), (0, True)]
    assert all(search.residual == search.start_residual for search in stopped)


def test_where_a_search_ends_the_next_victim_takes_its_place(problem, monkeypatch):
    """One of three solved at its start, and one that needs a pass less: who is in which pass, and who ends when."""
    *_, images, labels, subspace = problem
    passes, victims = [], torch.tensor([0, 0, 1])
    target, a, observed, *_ = problem
    task = _task_of(UpdateMap(target, a, SHAPE, 32), flat_units(observed)[victims], labels[victims], subspace)
    images = images.flatten(1)[victims]
    starts = images.clone()
    starts[1:] = starts[1:].flip(1)
    lefts = {1: 2, 2: 1}  # passes that each needs

    def move(kind, task, rows, points, values, config, axes, courses):
        passes.append(rows.tolist())
        for place, victim in enumerate(rows.tolist()):
            lefts[victim] -= 1
            if not lefts[victim]:
                points[place], values[place] = images[victim], task.observed[victim]
        return points, values

    monkeypatch.setattr(module, "_moved", move)
    axes = [Axes.of(subspace.basis)] * 3
    for together, expected, order in ((1, [[1], [1], [2]], [0, 1, 2]), (2, [[1, 2], [1]], [0, 2, 1])):
        passes.clear()
        lefts.update({1: 2, 2: 1})
        ended = search_together(task, starts, GaussNewtonConfig(), axes, together)
        assert [victim for victim, _ in ended] == order and passes == expected


def test_the_time_of_a_pass_is_divided_among_those_that_take_it(problem, monkeypatch):
    clock = iter(range(0, 10000, 10))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "_moved", lambda kind, task, rows, points, values, *_: (points, values))
    assert [search.seconds for search in found(problem, passes=3)] == [15, 15]
    assert [search.seconds for search in found(problem, passes=3, together=1)] == [30, 30]
    stopped = found(problem, passes=3, minutes=0.1)
    assert [(search.passes, search.seconds, search.stopped) for search in stopped] == [(2, 10, True)] * 2


def test_no_limit_of_time_stops_newtons_steps_that_converge(problem, monkeypatch):
    """Each pass halves the distance to the image until `last`; from there on the residual stays where it is."""
    images, task, kinds = problem[3].flatten(1), task_of(problem), []

    def halving(kind, task, rows, points, values, config, axes, courses):
        kinds.append(kind)
        if len(kinds) < last:
            points = images[rows] + (points - images[rows]) / 2
        return points, task.update_of(points, rows)

    monkeypatch.setattr(module, "_moved", halving)
    monkeypatch.setattr(module, "next_kind", lambda *_, **__: Kind.NEWTON)
    for last, stopped in ((4, True), (40, False)):
        kinds.clear()
        search = found(problem, minutes=1e-9, together=1, distance=0.01, task=task)[0]
        assert search.stopped is stopped and (search.passes == last if stopped else search.residual < 1e-5)


def test_a_search_that_begins_again_draws_another_start_and_the_next_clouds_size(problem, monkeypatch):
    passes = []

    def stuck(kind, task, rows, points, values, config, axes, courses):
        passes.append((courses[0].cloud.samples, points[0].clone()))
        return points, values

    monkeypatch.setattr(module, "_moved", stuck)
    found(problem, passes=6, patience=2, samples=(1.5, 3.0), spread=0.1)
    assert [samples for samples, _ in passes] == [1.5, 1.5, 3.0, 3.0, 1.5, 1.5]
    (_, first), (_, same), (_, second), *_, (_, third) = passes
    assert torch.equal(first, same) and 0 < (second - first).abs().max() < 0.2 and not torch.equal(second, third)


def test_a_solution_outside_the_box_is_not_taken(problem, monkeypatch):
    task = task_of(problem)
    outside = problem[3].flatten(1) + 0.7
    monkeypatch.setattr(module, "_moved", lambda kind, task, rows, *_: (outside[rows], task.observed[rows]))
    for search in found(problem, task=task, passes=3):
        assert search.residual > REPRODUCED and search.image.min() >= 0 and search.image.max() <= 1


def test_a_cpu_searches_few_side_by_side_and_a_gpu_as_many_as_fit():
    assert module.victims_together(torch.device("cpu"), 784, 28672) == module.CPU_TOGETHER
    assert 1 <= module.newtons_together(torch.device("cpu"), 784, 28672) < module.CPU_TOGETHER
    if torch.cuda.is_available():
        assert module.victims_together(torch.device("cuda"), 784, 28672) >= 8
