"""Statistical linearisation against its definitions: refitted regressions, sizes of clouds, a map that is linear."""

import itertools

import pytest
import torch

from r2f_ext.inversion import linearisation
from r2f_ext.inversion.linearisation import Axes, Cloud, linearised_steps


def axes_of(pixels=12, directions=5):
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(pixels, directions, dtype=torch.float64)).Q
    return Axes.of(q * torch.tensor([0.1, 0.08, 0.05, 0.03, 0.02], dtype=torch.float64))


def bent(images):
    """A smooth map [n, 12] -> [n, 40]."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(12, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.sin(2 * images @ first) + 0.1 * (images @ second).square()


def linearised_step(update_of, observed, point, value, axes, cloud, generator):
    """The step of one victim."""
    found, value, (cloud,) = linearised_steps(
        lambda images, _: update_of(images), observed[None], point, value, [axes], [cloud], [generator]
    )
    return found, value, cloud


def misfit(update_of, image, observed):
    return float((update_of(image) - observed).norm())


@pytest.mark.parametrize("share", [1e-2, 1e-5])
def test_what_is_left_out_equals_a_fit_without_that_one(monkeypatch, share):
    """Kernel ridge with an undamped constant, as the saddle system [K + lam I, 1; 1^T, 0]."""
    monkeypatch.setattr(linearisation, "DAMPINGS", (share,))
    torch.manual_seed(1)
    updates, offsets = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    asked = torch.randn(6, dtype=torch.float64)
    found, errors = linearisation._regress(updates, offsets, asked)
    unit = torch.cdist(updates, updates).square().mean()
    ridge = share * torch.linalg.eigvalsh(linearisation._kernels(updates, asked)[0])[-1]

    def kernel(x, y):
        gaussian = torch.exp(-linearisation.WIDTH * torch.cdist(x, y).square() / unit)
        return 2 * (1 - linearisation.GAUSSIAN) * x @ y.T / unit + linearisation.GAUSSIAN * gaussian

    def estimate(rows, point):
        system = torch.ones(len(rows) + 1, len(rows) + 1, dtype=torch.float64)
        system[:-1, :-1] = kernel(updates[rows], updates[rows]) + ridge * torch.eye(len(rows))
        system[-1, -1] = 0
        right = torch.cat([offsets[rows], torch.zeros(1, 2, dtype=torch.float64)])
        similar = torch.cat([kernel(point[None], updates[rows])[0], torch.ones(1, dtype=torch.float64)])
        return similar @ torch.linalg.solve(system, right)

    torch.testing.assert_close(found, estimate(list(range(9)), asked), rtol=1e-7, atol=1e-9)
    for left_out in range(9):
        others = [row for row in range(9) if row != left_out]
        expected = offsets[left_out] - estimate(others, updates[left_out])
        torch.testing.assert_close(errors[left_out], expected, rtol=1e-6, atol=1e-8)


def test_the_cloud_is_as_wide_as_the_misfit():
    point = torch.full((1, 12), 0.5, dtype=torch.float64)
    shifts = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.02
    for wanted in (0.5, 1.0, 2.0):
        (size,) = linearisation._sizes(lambda images, _: bent(images), [wanted], point, bent(point), shifts[None])
        reached = (bent((point + size * shifts).clamp(0, 1)) - bent(point)).norm(dim=1).median()
        assert 0.8 * wanted < reached < 1.25 * wanted


def test_a_linear_map_is_inverted_in_one_step():
    axes, generator = axes_of(), torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 30, dtype=torch.float64, generator=generator)
    point = torch.full((1, 12), 0.5, dtype=torch.float64)
    image = point + torch.tensor([[0.1, -0.1, 0.05, 0.02, -0.03]], dtype=torch.float64) @ axes.directions.T
    observed = (image @ matrix)[0]
    found, value, _ = linearised_step(
        lambda images: images @ matrix, observed, point, point @ matrix, axes, Cloud(axes.covariance), generator
    )
    assert (found - image).abs().max() < 5e-3  # the kernel is not quite linear
    torch.testing.assert_close(value, found @ matrix)


def test_a_cloud_has_as_many_images_per_axis_as_it_says():
    axes, point, sizes = axes_of(), torch.full((1, 12), 0.5, dtype=torch.float64), []

    def counted(images):
        sizes.append(len(images))
        return bent(images)

    for samples in (1.5, 4.0):
        cloud = Cloud(axes.covariance, samples=samples)
        *_, after = linearised_step(counted, bent(point)[0] + 1, point, bent(point), axes, cloud, torch.Generator())
        assert int(samples * 5) + 1 in sizes and after.samples == samples


def test_steps_on_a_bent_map_never_raise_the_misfit_and_come_close():
    axes, generator = axes_of(), torch.Generator().manual_seed(0)
    image = 0.5 + torch.tensor([[0.15, -0.1, 0.06, 0.03, -0.03]], dtype=torch.float64) @ axes.directions.T
    point, cloud = torch.full((1, 12), 0.5, dtype=torch.float64), Cloud(axes.covariance)
    observed, value = bent(image)[0], bent(point)
    misfits = [misfit(bent, point, observed)]
    for _ in range(8):
        point, value, cloud = linearised_step(bent, observed, point, value, axes, cloud, generator)
        misfits.append(misfit(bent, point, observed))
    assert all(after <= before for before, after in itertools.pairwise(misfits))
    assert misfits[-1] < 0.05 * misfits[0]


def test_a_cloud_keeps_most_of_the_last_ones_size():
    axes, point = axes_of(), torch.full((1, 12), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    value = bent(point)
    _, _, cloud = linearised_step(bent, value[0] + 1e-6, point, value, axes, Cloud(axes.covariance, 2.0), generator)
    assert cloud.size == linearisation.SHRINKS * 2


def test_the_shape_mixes_the_routes_errors_with_the_proxies_variation():
    axes = axes_of()
    errors = torch.randn(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ axes.directions.T
    mixed = Axes.of(axes.directions * axes.covariance.diagonal().sqrt(), errors).covariance
    own = torch.cov((errors @ axes.directions).T)
    expected = own / 2 + axes.covariance * own.trace() / axes.covariance.trace() / 2
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("few", [1, 2, 5])
def test_two_victims_take_the_steps_that_each_takes_alone(few, monkeypatch):
    """Whether their clouds are mapped at once, as on a GPU, or one after the other."""
    monkeypatch.setattr(linearisation, "clouds_together", lambda device, each: few)
    axes, wanted = axes_of(), bent(torch.rand(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    points = torch.tensor([[0.5], [0.4]], dtype=torch.float64).expand(2, 12)
    clouds = [Cloud(axes.covariance, samples=10.0), Cloud(axes.covariance, samples=12.0)]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (0, 1)]

    seen = []
    together = linearised_steps(
        lambda images, owners: (seen.append(owners.tolist()), bent(images))[1],
        wanted,
        points,
        bent(points),
        [axes, axes],
        clouds,
        generators(),
    )
    counts = [(owners.count(0), owners.count(1)) for owners in seen]
    assert [each for each in counts if max(each) > 48] == ([(51, 61)] if few > 1 else [(51, 0), (0, 61)])
    for victim, generator in enumerate(generators()):
        rows = slice(victim, victim + 1)
        alone = linearised_step(bent, wanted[victim], points[rows], bent(points[rows]), axes, clouds[victim], generator)
        torch.testing.assert_close(alone[0][0], together[0][victim])
        torch.testing.assert_close(alone[1][0], together[1][victim])
        assert alone[2].size == pytest.approx(together[2][victim].size)
