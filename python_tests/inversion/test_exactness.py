"""The bound on an image's error: on maps whose inverse is known, and what is said of it."""

from types import SimpleNamespace

import pytest
import torch

from r2f_ext.inversion.exactness import (
    Bound,
    bound_error,
    exactness_of,
    rounded,
    storage_precision,
)
from r2f_ext.inversion.pixel_axes import EXPLAINED
from r2f_ext.types import Reconstruction

PIXELS, LABEL = 40, torch.tensor([0])


class Known:
    """z(x) = M x + bend (N x)^2, float64."""

    def __init__(self, rank=PIXELS, size=120, bend=0.1):
        self.target, self.directions = SimpleNamespace(), 16
        self.matrix = torch.randn(size, rank, dtype=torch.float64) @ torch.randn(rank, PIXELS, dtype=torch.float64)
        self.curved = bend * torch.randn(size, PIXELS, dtype=torch.float64)

    def __call__(self, points, label):
        return points @ self.matrix.T + (points @ self.curved.T).square()

    def together(self, batches, label):
        return self(batches, label).mean(1)

    def jacobian(self, point, label, basis):
        slope = self.matrix + 2 * (self.curved @ point)[:, None] * self.curved
        return (slope @ basis).T


def psnr_db(found, image):
    return float(-10 * (found - image).square().mean().log10())


def noise(size, count=32, deviation=1e-4):
    return deviation * torch.randn(count, size, dtype=torch.float64)


@pytest.mark.parametrize("size", [60, 120, 400], ids=["few numbers", "some", "sketched"])
@pytest.mark.parametrize("bend", [0.1, 0.3])
def test_the_bound_holds_and_is_not_idle(size, bend):
    """The image is one that a search could have ended at: a little beside the least-squares one."""
    updates = Known(size=size, bend=bend)
    for trial in range(20):
        image = torch.rand(PIXELS, dtype=torch.float64)
        observed = updates(image[None], LABEL)[0] + noise(size, 1)[0]
        beside = image + (1 + trial % 3) * 1e-3 * torch.randn(PIXELS, dtype=torch.float64)
        known = bound_error(updates, observed, noise(size), beside, LABEL)
        assert known.free == 0 and known.misfit < EXPLAINED
        assert known.db <= psnr_db(beside, image) <= known.db + 40


@pytest.mark.parametrize("apart", [0.0, 0.01, 0.03, 0.1])
def test_neither_image_of_a_batch_is_claimed_to_be_the_mean_of_both(apart):
    """The mean of two alike images nearly reproduces their update: what is claimed holds for either of them."""
    updates, mean = Known(bend=0.3), torch.rand(PIXELS, dtype=torch.float64)
    for _ in range(10):
        pair = mean + apart * torch.randn(PIXELS, dtype=torch.float64) * torch.tensor([[1.0], [-1.0]])
        observed = updates(pair, LABEL).mean(0) + noise(120, 1)[0]
        known = bound_error(updates, observed, noise(120), mean, LABEL)
        assert not known.db > psnr_db(mean, pair[0])


def test_a_map_that_does_not_bend_tells_no_batch_from_its_mean():
    updates, image = Known(bend=0.0), torch.rand(PIXELS, dtype=torch.float64)
    assert not bound_error(updates, updates(image[None], LABEL)[0], noise(120), image, LABEL).db > 0


def test_directions_that_the_update_does_not_see_are_counted():
    updates = Known(rank=27, bend=0.0)
    image = torch.rand(PIXELS, dtype=torch.float64)
    known = bound_error(updates, updates(image[None], LABEL)[0], noise(120), image, LABEL)
    assert known.free == PIXELS - 27 and known.db != known.db and not known.exact


def test_directions_that_rounding_hides_are_free_as_well():
    updates = Known(bend=0.0)
    left, singular, right = torch.linalg.svd(updates.matrix, full_matrices=False)
    singular[-3:] = 1e-4  # as large as the noise: a move of 1
    updates.matrix = left @ torch.diag(singular) @ right
    image = torch.rand(PIXELS, dtype=torch.float64)
    assert bound_error(updates, updates(image[None], LABEL)[0], noise(120), image, LABEL).free == 3


def test_a_residual_that_rounding_does_not_explain_is_no_ground_for_a_bound():
    updates, image = Known(), torch.rand(PIXELS, dtype=torch.float64)
    observed = updates(image[None], LABEL)[0] + noise(120, 1, 1e-2)[0]
    known = bound_error(updates, observed, noise(120), image, LABEL)
    assert known.misfit > EXPLAINED and not known.exact and known.db != known.db


class Valley(Known):
    """M d + (N d)^2 + (K d)^2, d = x - centre. M hardly shows the last half of its axes; N d is of the first half alone
    and K d of the last, so that a full step, which takes (N d)^2 for linear, goes far along axes where z is not."""

    def __init__(self, centre, smallest):
        super().__init__()
        self.centre = centre
        left, singular, right = torch.linalg.svd(self.matrix, full_matrices=False)
        singular[PIXELS // 2 :] = smallest
        self.matrix, steep, shallow = left @ torch.diag(singular) @ right, *right.split(PIXELS // 2)
        self.bent = [3 * torch.randn(120, PIXELS // 2, dtype=torch.float64) @ axes for axes in (steep, shallow)]

    def __call__(self, points, label):
        moves = points - self.centre
        return moves @ self.matrix.T + sum((moves @ each.T).square() for each in self.bent)

    def jacobian(self, point, label, basis):
        slope = self.matrix + sum(2 * (each @ (point - self.centre))[:, None] * each for each in self.bent)
        return (slope @ basis).T


@pytest.mark.parametrize("smallest", [1e-3, 1e-2], ids=["free directions", "hardly determined ones"])
def test_rounding_that_explains_the_residual_is_found_where_full_steps_go_astray(smallest):
    """There is no bound, as damped steps leave the shallow axes as they are: but the residual is rounding's."""
    image = torch.rand(PIXELS, dtype=torch.float64)
    updates = Valley(image, smallest)
    observed = updates(image[None], LABEL)[0] + noise(120, 1)[0]
    beside = image + 3e-3 * torch.randn(PIXELS // 2, dtype=torch.float64) @ torch.linalg.svd(updates.matrix)[2][:20]
    known = bound_error(updates, observed, noise(120), beside, LABEL)
    assert known.misfit <= EXPLAINED and not known.exact and known.db != known.db
    assert (known.free > 0) == (smallest == 1e-3)
    elsewhere = bound_error(updates, observed + noise(120, 1, 1e-2)[0], noise(120), beside, LABEL)
    assert elsewhere.misfit > EXPLAINED


class Rough:
    """A map in float32 arithmetic."""

    def __init__(self, precise):
        self.precise, self.target, self.directions = precise, precise.target, precise.directions

    def __call__(self, points, label):
        matrix, curved = self.precise.matrix.float(), self.precise.curved.float()
        return points @ matrix.T + (points @ curved.T).square()

    def jacobian(self, point, label, basis):
        return Known.jacobian(self.precise, point.double(), label, basis.double()).float()


def both_bounds(updates, deviation=1e-4):
    """By the float64 Jacobian alone, and with float32's tried first; whether float64's was needed then too."""
    image = torch.rand(PIXELS)
    observed = updates(image[None].double(), LABEL)[0] + noise(len(updates.matrix), 1, deviation)[0]
    errors = noise(len(updates.matrix), deviation=deviation)
    slow = bound_error(updates, observed, errors, image, LABEL)
    needed = []
    updates.jacobian = lambda *given: needed.append(given) or Known.jacobian(updates, *given)
    return slow, bound_error(updates, observed, errors, image, LABEL, Rough(updates)), bool(needed)


@pytest.mark.parametrize("size", [60, 120, 400])
def test_the_jacobian_of_the_models_own_arithmetic_gives_the_same_bound(size):
    slow, fast, needed = both_bounds(Known(size=size))
    assert fast.db == pytest.approx(slow.db, abs=0.01) and fast.misfit == pytest.approx(slow.misfit, rel=1e-3)
    assert fast.free == slow.free == 0 and not needed


def test_it_finds_as_much_of_a_residual_unexplained():
    updates, image = Known(), torch.rand(PIXELS)
    observed, errors = updates(image[None].double(), LABEL)[0] + noise(120, 1, 1e-2)[0], noise(120)
    slow = bound_error(updates, observed, errors, image, LABEL)
    updates.jacobian = None  # of float64, which is not needed
    fast = bound_error(updates, observed, errors, image, LABEL, Rough(updates))
    assert fast.misfit == pytest.approx(slow.misfit, rel=1e-3) and fast.misfit > EXPLAINED and fast.free == 0


@pytest.mark.parametrize("smallest", [1e-3, 1e-8], ids=["a free direction", "a direction beyond float32"])
def test_where_it_could_mislead_the_float64_jacobian_decides(smallest):
    updates = Known(bend=0.0)
    left, singular, right = torch.linalg.svd(updates.matrix, full_matrices=False)
    singular[-1] = smallest
    updates.matrix = left @ torch.diag(singular) @ right
    slow, fast, needed = both_bounds(updates)
    assert needed and repr(fast) == repr(slow) and slow.free == 1


def test_as_many_numbers_as_pixels_validate_nothing():
    """Any image solves a square system, so its residual says nothing about the model."""
    updates, image = Known(size=PIXELS), torch.rand(PIXELS, dtype=torch.float64)
    assert not bound_error(updates, updates(image[None], LABEL)[0], noise(PIXELS), image, LABEL).exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_drawn_as_large_as_storage_makes_it(dtype):
    exact = torch.randn(2000, dtype=torch.float64) * 10.0 ** torch.linspace(-7, 0, 2000, dtype=torch.float64)
    stored = exact.to(dtype).to(torch.promote_types(dtype, torch.float32))
    assert storage_precision(stored).dtype == str(dtype).removeprefix("torch.")
    drawn = rounded(stored, torch.Generator().manual_seed(0)) - stored.double()
    size = exact.abs()
    for part in (size < 1e-5, size > 1e-3):  # float16 has no relative precision below 6e-5
        true, found = (each[part].square().mean().sqrt() for each in (stored.double() - exact, drawn))
        assert dtype == torch.float64 or 0.9 * true <= found <= 3 * true


FOUND = {"residual": 1e-5, "exact": 0.0, "bound_db": torch.nan, "free_directions": torch.nan, "misfit": torch.nan}


@pytest.mark.parametrize(
    ("figures", "doubt", "words"),
    [
        ({"exact": 1.0, "bound_db": 58.9, "free_directions": 0, "misfit": 1.0}, None, "exact to 58 dB"),
        ({"free_directions": 365, "misfit": 1.0}, None, "determined up to 365 directions"),
        ({"bound_db": 31.9, "free_directions": 0, "misfit": 1.0}, None, "determined to 31 dB"),
        ({"free_directions": 0, "misfit": 40.0}, None, "not exact: the residual is 1e-05, more than rounding explains"),
        (
            {"free_directions": 0, "misfit": 40.0, "stopped": 1.0},
            None,
            "not exact: the residual is 1e-05 where the time limit stopped the search, more than rounding explains",
        ),
        ({"residual": 0.02}, None, "not exact: the residual is 0.02"),
        ({"residual": 0.02, "free_directions": 3, "misfit": 90.0}, None, "not exact: the residual is 0.02"),
        ({"residual": 0.002, "bound_db": 31.9, "free_directions": 0, "misfit": 1.0}, None, "determined to 31 dB"),
        ({}, None, "not determined"),
        ({}, "'a' was trained with dropout", "not exact: 'a' was trained with dropout"),
    ],
)
def test_words(figures, doubt, words):
    per_victim = {key: torch.tensor([value]) for key, value in (FOUND | figures).items()}
    said = exactness_of(
        Reconstruction("r", torch.zeros(1, 1, 2, 2), None, "", 0.0, per_victim=per_victim, doubt=doubt), 0
    )
    assert said.words == words and said.exact == words.startswith("exact")
    assert (said.bound_db is None) == (figures.get("bound_db") is None)


def test_routes_without_figures_determine_nothing():
    said = exactness_of(Reconstruction("r", torch.zeros(1, 1, 2, 2), None, "", 0.0), 0)
    assert (said.exact, said.bound_db, said.free_directions, said.words) == (False, None, None, "not determined")


def test_exact_asks_for_all_three():
    assert Bound(45.0, 0, 1.0).exact
    assert not Bound(39.0, 0, 1.0).exact and not Bound(45.0, 1, 1.0).exact and not Bound(45.0, 0, 4.0).exact
    assert not Bound().exact
