"""Gauss-Newton in LoRA space: on a small ViT in float64, against the images that the updates were made from."""

import sys
from dataclasses import replace

import pytest
import torch
from cases import target_of
from gauss_newton_cases import NAMES, SHAPE, small_problem, start_near

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.errors import R2FError
from r2f_ext.inversion import gauss_newton as module
from r2f_ext.inversion import searches
from r2f_ext.inversion.exactness import exactness_of
from r2f_ext.inversion.gauss_newton import (
    UpdateBound,
    _task_of,
    finished,
    free_positions,
    gauss_newton,
    process_bytes,
    search,
)
from r2f_ext.inversion.newton import SOLVED, Search
from r2f_ext.inversion.task import NEAR, GaussNewtonConfig
from r2f_ext.inversion.update_map import Subspace, UpdateMap, flat_units
from r2f_ext.types import Reconstruction


@pytest.fixture(scope="module")
def problem():
    return small_problem()


def test_finds_the_images_and_says_that_they_are_exact(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 0.3)
    told = []
    found = gauss_newton(target, a, observed, start, subspace, advance=lambda *said: told.append(said))
    before, after = (start.images - images).abs().max(), (found.images - images).abs().max()
    assert before > 1e-3 and after < 1e-4
    assert found.details["exact"] == 2 and "2 of 2" in found.why
    assert [units for units, _ in told] == [1, 1] and told[1][1].endswith("exact to 60 dB; 2 exact so far")
    error = (found.images - images).square().mean((1, 2, 3))
    assert (found.per_victim["bound_db"] <= -10 * error.log10()).all() and found.per_victim["bound_db"].min() >= 60
    assert found.per_victim["free_directions"].tolist() == [0, 0]


def test_the_same_image_under_a_doubt_is_not_called_exact(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 0.3)
    found = gauss_newton(target, a, observed, start, subspace, doubt="its training had dropout")
    assert (found.images - images).abs().max() < 1e-4
    assert found.details["exact"] == 0 and found.per_victim["bound_db"].isnan().all()
    assert exactness_of(found, 0).words == "not exact: its training had dropout"
    assert found.why.endswith("0 of 2 images are exact, because its training had dropout")


@pytest.mark.parametrize("names", [NAMES[5:], NAMES[7:]], ids=["behind the last attention", "fc2 alone"])
def test_images_beside_that_have_the_same_update_are_not_called_exact(problem, names):
    """Class-token pooling: the gradients have rank 1, and the update leaves most directions free."""
    whole, _, _, images, labels, _ = problem
    target = target_of(whole.base, names, rank=32)
    a = {layer.name: torch.randn(32, layer.d_in, dtype=torch.float64) / layer.d_in**0.5 for layer in target.layers}
    with Capture(target) as capture:
        observed = project(target, capture(images[:, None], labels[:, None]), a)
    point = images[0].flatten()
    jacobian = UpdateMap(target, a, SHAPE, 64).jacobian(point, labels[:1], torch.eye(192, dtype=torch.float64))
    singular = torch.linalg.svd(jacobian)
    rank = int((1e-9 * singular.S[0] < singular.S).sum())
    hidden = singular.U[:, rank:] @ torch.randn(192 - rank, dtype=torch.float64)
    beside = point + 0.05 * hidden / hidden.norm()
    known = UpdateBound(UpdateMap(target, a, SHAPE, 64), observed)(0, beside, labels[:1])
    assert rank < 100 and abs(known.free - (192 - rank)) <= 2
    assert known.db != known.db and not known.exact


def test_far_from_a_solution_no_jacobian_is_computed(problem, monkeypatch):
    """Rounding to bfloat16 alone leaves a residual beyond NEAR in the second case: there the image is judged."""
    target, a, observed, images, labels, _ = problem
    point, shift = images[0].flatten(), torch.randn(192, generator=torch.Generator().manual_seed(0))
    computed, whole = [], UpdateMap.jacobian
    monkeypatch.setattr(UpdateMap, "jacobian", lambda *given: computed.append(given) or whole(*given))
    coarse = {name: update.bfloat16().to(update.dtype) for name, update in observed.items()}
    for stored, size, judged in ((observed, 0.0, True), (observed, 0.05, False), (coarse, 0.002, True)):
        computed.clear()
        beside = (point + size * shift.to(point)).clamp(0, 1)
        updates = UpdateMap(target, a, SHAPE, 64)
        known = UpdateBound(updates, stored)(0, beside, labels[:1])
        wanted = flat_units({name: update[:1] for name, update in stored.items()})
        residual = (updates(beside[None], labels[:1]) - wanted).norm() / len(observed) ** 0.5
        assert bool(residual > NEAR) is (size > 0)
        assert bool(computed) is judged and (known.misfit == known.misfit) is judged


def test_the_victims_learning_rate_plays_no_part(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 0.3)
    scaled = {name: 1e-4 * update for name, update in observed.items()}
    found, other = (gauss_newton(target, a, z, start, subspace).images for z in (observed, scaled))
    torch.testing.assert_close(found, other, rtol=0, atol=1e-6)


def test_a_wrong_label_is_not_called_exact_and_gives_back_the_start(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, (labels + 1) % 5, subspace, 0.3)
    found = gauss_newton(target, a, observed, start, subspace, GaussNewtonConfig(passes=3))
    assert found.details["exact"] == 0
    torch.testing.assert_close(found.images, start.images)


@pytest.mark.parametrize(
    ("broken", "words"),
    [("zero", "every layer is zero"), ("nan", "not finite"), ("labels", "needs labels")],
)
def test_bad_input_is_refused(problem, broken, words):
    target, a, observed, images, labels, subspace = problem
    start = Reconstruction("given", images, None if broken == "labels" else labels, "", 0.0)
    if broken != "labels":
        observed = {name: each * (0 if broken == "zero" else float("nan")) for name, each in observed.items()}
    with pytest.raises(R2FError, match=words):
        gauss_newton(target, a, observed, start, subspace)


def test_layers_that_did_not_move_are_left_out(problem):
    target, a, observed, images, labels, subspace = problem
    name = target.names[0]
    observed = {**observed, name: 0 * observed[name]}
    found = gauss_newton(target, a, observed, start_near(images, labels, subspace, 0.1), subspace)
    assert (found.images - images).abs().max() < 1e-4


def test_per_victim_figures_are_tensors(problem):
    target, a, observed, images, labels, subspace = problem
    found = gauss_newton(target, a, observed, start_near(images, labels, subspace, 0.3), subspace)
    of_search = {"residual", "start_residual", "passes", "search_seconds", "stopped"}
    assert set(found.per_victim) == of_search | {"exact", "bound_db", "free_directions", "misfit"}
    assert all(values.shape == (2,) for values in found.per_victim.values())
    assert found.per_victim["residual"].max() < 1e-4 and found.per_victim["exact"].tolist() == [1, 1]


def test_searches_side_by_side_end_where_each_ends_alone(problem, monkeypatch):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 0.3)
    together = gauss_newton(target, a, observed, start, subspace)
    monkeypatch.setattr(module, "victims_together", lambda *_: 1)
    alone = gauss_newton(target, a, observed, start, subspace)
    torch.testing.assert_close(together.images, alone.images, rtol=0, atol=1e-7)
    for figure in ("passes", "exact", "start_residual"):
        torch.testing.assert_close(together.per_victim[figure], alone.per_victim[figure])


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_searches_in_processes_of_their_own_end_where_they_end_here(problem, monkeypatch):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 0.3)
    expected = gauss_newton(target, a, observed, start, subspace)
    here, ended = [], module.finished
    monkeypatch.setattr(searches, "processes_for", lambda *_: 2)
    monkeypatch.setattr(module, "finished", lambda *given: here.append(given) or ended(*given))
    found = gauss_newton(target, a, observed, start, subspace)
    assert not here, "no search ran in this process"
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)
    assert found.details["exact"] == 2 and found.why == expected.why


@pytest.mark.parametrize("frees", [True, False])
def test_the_memory_of_a_process_covers_its_largest_matrices(problem, frees):
    target, a, *_, subspace = problem
    positions = free_positions(UpdateMap(target, a, SHAPE, 64), subspace) if frees else None
    q, numbers = subspace.basis.shape[1], 10**6
    known = process_bytes(subspace, positions, numbers)
    cloud = 3 * q * (2 * 4 * numbers + 3 * q * 8)  # updates, centred ones, and kernels in float64
    jacobian = q if positions is None else positions.basis.shape[1]
    assert known >= max(cloud, 2 * 4 * jacobian * numbers)
    assert process_bytes(Subspace(subspace.basis.to("meta")), None, numbers) is None


def task_of(problem, victim):
    """The search for one victim in float64."""
    target, a, observed, _, labels, subspace = problem
    own = slice(victim, victim + 1)
    return _task_of(UpdateMap(target, a, SHAPE, 32), flat_units(observed)[own], labels[own], subspace)


def test_the_end_of_a_search_goes_on_in_float64(problem):
    """What float32 can store of the image is where the search stops; float64 goes on from there, and counts passes."""
    *_, images, labels, subspace = problem
    near = start_near(images, labels, subspace, 1e-3).images.flatten(1)
    for victim in range(2):
        task, point = task_of(problem, victim), near[victim]
        (residual,) = task.residuals(task.update_of(point[None], torch.tensor([0])), torch.tensor([0]))
        refined = finished(task, Search(point.float(), residual, 0.5, 9, seconds=1.0))
        assert refined.image.dtype == torch.float32 and 9 < refined.passes <= 9 + module.FINISH.passes
        assert refined.residual < 1e-5 < residual and refined.start_residual == 0.5 and refined.seconds > 1
        error, before = ((each - images[victim].flatten()).abs().max() for each in (refined.image, point))
        assert error < 1e-5 < before


def test_an_end_in_float64_that_is_no_better_changes_nothing(problem, monkeypatch):
    images = problem[3]
    worse = Search(images[1].flatten(), 1.0, 0.5, 2, seconds=1.0)
    monkeypatch.setattr(module, "search_together", lambda *_, **__: iter([(0, worse)]))
    found = Search(images[0].flatten().float(), 1e-4, 0.5, 9, seconds=2.0)
    kept = finished(task_of(problem, 0), found)
    assert torch.equal(kept.image, found.image) and kept.residual == found.residual
    assert (kept.passes, kept.seconds) == (11, 3)


def test_an_end_that_weighs_the_update_otherwise_counts_by_the_weights_of_the_search(problem, monkeypatch):
    """It is kept where the search's own task finds it hardly worse: what that task fits best has errors of its own."""
    rough, image = replace(task_of(problem, 0), noise=0.02), problem[3][0].flatten()
    one = torch.zeros(1, dtype=torch.int64)
    for step, kept in ((1e-9, True), (0.05, False)):
        end = (image + step).clamp(0, 1)
        monkeypatch.setattr(
            module, "search_together", lambda *_, end=end, **__: iter([(0, Search(end, 0.3, 0.5, 1, noise=1e-3))])
        )
        (own,) = rough.residuals(rough.update_of(end[None], one), one)
        found = Search((image + 1e-3).clamp(0, 1), 0.0199, 0.5, 4, noise=0.02)
        ended = finished(replace(rough, noise=1e-3), found, rough)
        assert torch.equal(ended.image, end if kept else found.image) and ended.noise == 0.02
        assert ended.residual == pytest.approx(own if kept else 0.0199) and ended.passes == 5


@pytest.mark.parametrize(
    ("residual", "stopped", "goes_on"),
    [(0.5 * SOLVED, False, False), (0.5 * NEAR, False, True), (2 * NEAR, False, False), (0.5 * NEAR, True, False)],
)
def test_only_searches_that_end_near_the_image_go_on_in_float64(problem, monkeypatch, residual, stopped, goes_on):
    image = problem[3][0].flatten()
    better = Search(image, 0.0, 0.5, 1)
    monkeypatch.setattr(module, "search_together", lambda *_, **__: iter([(0, better)]))
    ended = finished(task_of(problem, 0), Search(image, residual, 0.5, 1, stopped))
    assert ended.passes == 1 + goes_on and ended.residual == (0.0 if goes_on else residual)


def test_a_search_alone_counts_its_passes_and_stops_at_its_limit(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 1.0)
    updates, wanted = UpdateMap(target, a, SHAPE, 64), flat_units(observed)[0]
    config = GaussNewtonConfig(passes=1, steps=1)
    found = search(updates, wanted, start.images[0].flatten(), labels[:1], subspace, config)
    assert found.passes == 1 and found.start_residual > 0
