"""Gauss-Newton in LoRA space: on a small ViT in float64, against the images that the updates were made from."""

import pytest
import torch
from cases import target_of
from vit_cases import small_vit

from r2f_ext.capture import Capture
from r2f_ext.capture.project import project
from r2f_ext.errors import R2FError
from r2f_ext.inversion import gauss_newton as module
from r2f_ext.inversion.exactness import REPRODUCED, exactness_of
from r2f_ext.inversion.gauss_newton import (
    DenseLocal,
    DenseSteps,
    GaussNewtonConfig,
    Subspace,
    UpdateBound,
    UpdateMap,
    finish,
    flat_units,
    gauss_newton,
    search,
)
from r2f_ext.inversion.newton import Search
from r2f_ext.models.timm_base import unfuse_attention
from r2f_ext.types import Reconstruction

NAMES = tuple(f"blocks.{b}.{layer}" for b in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
SHAPE = torch.Size((3, 8, 8))


@pytest.fixture(scope="module")
def problem():
    """target, A, updates of two images of which only 40 directions are unknown, the images, labels, the subspace."""
    base = small_vit(img_size=8, embed_dim=64)
    unfuse_attention(base.model)
    target = target_of(base, NAMES, rank=8)
    torch.manual_seed(0)
    a = {
        layer.name: (2 * torch.rand(8, layer.d_in, dtype=torch.float64) - 1) / layer.d_in**0.5
        for layer in target.layers
    }
    smooth = torch.randn(40, 192, dtype=torch.float64) * 0.05
    proxies = (0.5 + torch.randn(300, 40, dtype=torch.float64) @ smooth / 40**0.5).unflatten(1, SHAPE)
    images, labels = proxies[:2].clamp(0, 1), torch.tensor([1, 4])
    with Capture(target) as capture:
        gradient = capture(images[:, None], labels[:, None])
    return target, a, project(target, gradient, a), images, labels, Subspace.of(proxies[2:])


def start_near(images, labels, subspace, distance):
    torch.manual_seed(1)
    basis = subspace.basis
    shift = torch.randn(len(images), basis.shape[1], dtype=torch.float64) * distance @ basis.T
    return Reconstruction("given", (images + shift.view_as(images)).clamp(0, 1), labels, "", 0.0)


def test_jacobian_equals_central_differences(problem):
    target, a, _, images, labels, subspace = problem
    updates = UpdateMap(target, a, SHAPE, directions=64)
    point, step = images[0].flatten(), 1e-6
    found = updates.jacobian(point, labels[:1], subspace.basis)
    columns = subspace.basis.T
    ahead, behind = updates(point + step * columns, labels[:1]), updates(point - step * columns, labels[:1])
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)


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
    beside = point + 0.5 * hidden / hidden.norm()
    known = UpdateBound(UpdateMap(target, a, SHAPE, 64), observed)(0, beside, labels[:1])
    assert rank < 100 and abs(known.free - (192 - rank)) <= 2
    assert known.db != known.db and not known.exact


def test_the_victims_learning_rate_plays_no_part(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 0.3)
    scaled = {name: 1e-4 * update for name, update in observed.items()}
    found, other = (gauss_newton(target, a, z, start, subspace).images for z in (observed, scaled))
    torch.testing.assert_close(found, other, rtol=0, atol=1e-6)


def test_the_slope_of_the_misfit_is_the_jacobian_times_the_error(problem):
    target, a, observed, images, labels, subspace = problem
    updates, wanted = UpdateMap(target, a, SHAPE, 64), flat_units(observed)[0]
    point = images[1].flatten().clone().requires_grad_()
    loss = updates.misfit(point, labels[:1], wanted)
    error = updates(point.detach()[None], labels[:1])[0] - wanted
    torch.testing.assert_close(loss.detach(), error.square().sum() / 2)
    (slope,) = torch.autograd.grad(loss, [point])
    jacobian = updates.jacobian(point.detach(), labels[:1], subspace.basis)
    torch.testing.assert_close(slope @ subspace.basis, jacobian @ error, rtol=1e-6, atol=1e-9)


def test_descent_and_clouds_take_turns_where_passes_stall(problem, monkeypatch):
    target, a, observed, images, labels, subspace = problem
    updates, wanted = UpdateMap(target, a, SHAPE, 32), flat_units(observed)[0]
    steps = DenseSteps(updates, wanted, labels[:1], subspace, GaussNewtonConfig(), None, lambda point: point.sum())
    monkeypatch.setattr(DenseSteps, "descended", lambda *_: ("descended", None))
    monkeypatch.setattr(module, "linearised_step", lambda *_: ("cloud", None, None))
    taken = []
    for before, residual in ((torch.inf, 0.9), (0.9, 0.5), (0.5, 0.45), (0.45, 0.09), (0.09, 0.085), (0.085, 0.084)):
        steps.judge(before, residual)
        taken.append(steps.move(images[:1].flatten(1), wanted[None])[0])
    assert taken == ["descended", "descended", "cloud", "cloud", "descended", "cloud"]
    steps.judge(0.08, 0.5 * module.NEAR)
    assert steps.newton and steps.restart() and not steps.newton and not steps.descending


def test_a_wrong_label_is_not_called_exact_and_gives_back_the_start(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, (labels + 1) % 5, subspace, 0.3)
    found = gauss_newton(target, a, observed, start, subspace, GaussNewtonConfig(passes=3))
    assert found.details["exact"] == 0
    torch.testing.assert_close(found.images, start.images)


def test_a_search_counts_its_passes_and_stops_at_its_limit(problem):
    target, a, observed, images, labels, subspace = problem
    start = start_near(images, labels, subspace, 1.0)
    updates = UpdateMap(target, a, SHAPE, 64)
    wanted = flat_units(observed)[0]
    config = GaussNewtonConfig(passes=1, steps=1)
    found = search(updates, wanted, start.images[0].flatten(), labels[:1], subspace, config)
    assert found.passes == 1 and found.start_residual > 0


def test_the_end_of_a_search_goes_on_in_float64(problem):
    """What float32 can store of the image is where the search stops; float64 goes on from there, and counts passes."""
    target, a, observed, images, labels, subspace = problem
    precise, wanted = UpdateMap(target, a, SHAPE, 32), flat_units(observed)[0]
    near = start_near(images, labels, subspace, 1e-3).images[0].flatten()
    residual = float((precise(near[None], labels[:1]) - wanted).norm()) / len(NAMES) ** 0.5
    found = Search(near.float(), residual, 0.5, 9)
    float32 = Subspace(subspace.basis.float())
    refined = finish(precise, wanted.float(), labels[:1], float32, GaussNewtonConfig(), found)
    assert refined.image.dtype == torch.float32 and 9 < refined.passes <= 9 + module.FINISH_PASSES
    assert refined.residual < 1e-5 < residual and refined.start_residual == 0.5
    assert (refined.image - images[0].flatten()).abs().max() < 1e-5 < (near - images[0].flatten()).abs().max()


def test_an_end_in_float64_that_is_no_better_changes_nothing(problem, monkeypatch):
    target, a, observed, images, labels, subspace = problem
    precise, wanted = UpdateMap(target, a, SHAPE, 32), flat_units(observed)[0]
    monkeypatch.setattr(module, "newton_steps", lambda *_: (images[1].flatten()[None], wanted[None] + 1))
    found = Search(images[0].flatten().float(), 0.0, 0.5, 9)
    kept = finish(precise, wanted, labels[:1], subspace, GaussNewtonConfig(), found)
    assert torch.equal(kept.image, found.image) and kept.residual == 0


def test_only_searches_that_end_near_the_image_go_on_in_float64(problem, monkeypatch):
    target, a, observed, images, labels, subspace = problem
    went_on = []
    monkeypatch.setattr(module, "finish", lambda *given: went_on.append(given[-1].residual) or given[-1])
    for residual in (0.5 * module.SOLVED, 0.5 * module.NEAR, 2 * module.NEAR):
        monkeypatch.setattr(module, "run_search", lambda *_, r=residual: Search(images[0].flatten(), r, 0.5, 1))
        updates = UpdateMap(target, a, SHAPE, 32)
        search(
            updates,
            flat_units(observed)[0],
            images[0].flatten(),
            labels[:1],
            subspace,
            GaussNewtonConfig(),
            None,
            updates,
        )
    assert went_on == [0.5 * module.NEAR]
    ended = Search(images[0].flatten(), 0.5 * module.NEAR, 0.5, 1, stopped=True)
    monkeypatch.setattr(module, "run_search", lambda *_: ended)
    updates = UpdateMap(target, a, SHAPE, 32)
    wanted, start = flat_units(observed)[0], images[0].flatten()
    assert search(updates, wanted, start, labels[:1], subspace, GaussNewtonConfig(minutes=1.0), None, updates) is ended
    assert len(went_on) == 1


def test_a_search_that_begins_again_takes_the_next_clouds_size(problem):
    target, a, observed, _, labels, subspace = problem
    config = GaussNewtonConfig(samples=(1.5, 3.0))
    steps = DenseSteps(UpdateMap(target, a, SHAPE, 32), flat_units(observed)[0], labels[:1], subspace, config)
    sizes = [steps.cloud.samples]
    for _ in range(2):
        assert steps.restart()
        sizes.append(steps.cloud.samples)
    assert sizes == [1.5, 3.0, 1.5]


def test_which_step_comes_next(problem):
    """Newton below NEAR, a cloud above FAR; between them the other one after a pass that stalls."""
    target, a, observed, _, labels, subspace = problem
    updates = UpdateMap(target, a, SHAPE, 64)
    steps = DenseSteps(updates, flat_units(observed)[0], labels[:1], subspace, GaussNewtonConfig())
    between, chosen = (module.NEAR * module.FAR) ** 0.5, []
    for before, residual in (
        (torch.inf, 2 * module.FAR),  # far
        (2 * module.FAR, between),  # a good pass: goes on with clouds
        (between, 0.95 * between),  # stalls: a derivative
        (between, 0.5 * between),  # a good pass: goes on with it
        (between, between),  # stalls: a cloud
        (between, 0.5 * module.NEAR),  # near
        (module.NEAR, 2 * module.FAR),  # far again
    ):
        steps.judge(before, residual)
        chosen.append(steps.newton)
    assert chosen == [False, False, True, True, False, True, False]


def test_a_solution_outside_the_box_is_not_called_exact(problem, monkeypatch):
    target, a, observed, images, labels, subspace = problem
    wanted, outside = flat_units(observed)[0], images[0].flatten() + 0.7

    def lands_outside(updates, observed, point, value, *_):
        return outside[None], observed[None]

    monkeypatch.setattr(module, "newton_steps", lands_outside)
    monkeypatch.setattr(module, "NEAR", 10.0)  # from the first pass on
    config, updates = GaussNewtonConfig(passes=3), UpdateMap(target, a, SHAPE, 64)
    found = search(updates, wanted, images[1].flatten(), labels[:1], subspace, config)
    assert found.residual > REPRODUCED and found.image.min() >= 0 and found.image.max() <= 1


def test_nothing_is_searched_where_no_proxy_varies():
    proxies = torch.rand(50, 3, 8, 8)
    proxies[:, :, :2] = 0.25
    basis = Subspace.of(proxies).basis.unflatten(0, (3, 8, 8))
    assert basis.shape[-1] <= 49 and basis[:, :2].abs().max() < 1e-5
    assert basis[:, 2:].abs().max() > 1e-2


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


def test_proxies_all_alike_are_refused():
    with pytest.raises(R2FError, match="all alike"):
        Subspace.of(torch.full((5, 3, 4, 4), 0.5))


def test_large_images_are_refused():
    with pytest.raises(R2FError, match="150528 numbers"):
        Subspace.of(torch.rand(2, 3, 224, 224))


def test_no_curvature_is_negative_in_float32(problem):
    """Directions that the update does not see have a curvature of 0; a Gram in float32 rounds many of them below."""
    target, a, _, images, labels, subspace = problem

    class Blind(UpdateMap):
        def jacobian(self, point, label, basis):
            seen = super().jacobian(point, label, basis).float()
            return torch.cat([seen, seen])

    local = DenseLocal(Blind(target, a, SHAPE, 64), images[0].flatten(), labels[:1], subspace)
    assert local.curvature.dtype == torch.float64 and local.curvature.min() >= 0
    gram = local.jacobian.double() @ local.jacobian.double().T
    recomposed = local.axes @ torch.diag(local.curvature) @ local.axes.T
    torch.testing.assert_close(recomposed, gram, rtol=1e-9, atol=1e-9 * float(gram.abs().max()))


def test_per_victim_figures_are_tensors(problem):
    target, a, observed, images, labels, subspace = problem
    found = gauss_newton(target, a, observed, start_near(images, labels, subspace, 0.3), subspace)
    figures = {"residual", "start_residual", "passes", "stopped", "exact", "bound_db", "free_directions", "misfit"}
    assert set(found.per_victim) == figures
    assert all(values.shape == (2,) for values in found.per_victim.values())
    assert found.per_victim["residual"].max() < 1e-4 and found.per_victim["exact"].tolist() == [1, 1]
