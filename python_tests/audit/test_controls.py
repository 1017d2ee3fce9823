"""Controls by hand."""

from dataclasses import replace

import pytest
import torch
from cases import cosine

from r2f_ext.audit import controls as module
from r2f_ext.audit.controls import Simulated, has_class, make_controls, noise_updates, simulated_psnr
from r2f_ext.audit.metrics import psnr_db
from r2f_ext.data import ImageSet
from r2f_ext.inversion import amortised
from r2f_ext.inversion.route import Proxies, adapter_problem
from r2f_ext.pairs import GeneratedPairs


def test_controls_by_hand():
    levels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)
    proxy = ImageSet("p", levels.view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous(), torch.tensor([0, 0, 1, 1]))
    labels = torch.tensor([1, 0, 7])
    guess = torch.tensor([0.35, 0.9, 0.05]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    shuffled = torch.rand(3, 1, 2, 2)
    controls = make_controls(proxy, labels, guess, shuffled)

    def level(images):
        assert images.shape == (3, 1, 2, 2)
        assert torch.equal(images, images[:, :, :1, :1].expand_as(images))
        return [round(value, 4) for value in images[:, 0, 0, 0].tolist()]

    assert level(controls.mean_image) == [0.4, 0.4, 0.4]
    assert level(controls.class_mean) == [0.7, 0.1, 0.4]  # class 7 is not in the proxy: the mean image
    assert level(controls.nearest_proxy) == [0.4, 1.0, 0.0]
    assert torch.equal(controls.shuffled_adapter, shuffled)
    assert list(controls.items()) == ["mean_image", "class_mean", "nearest_proxy", "shuffled_adapter"]


def test_a_class_mean_needs_labels_and_images_of_the_class():
    proxy = ImageSet("p", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]))
    guess = torch.rand(2, 1, 2, 2)
    assert make_controls(proxy, None, guess, guess).class_mean is None
    assert "class_mean" not in make_controls(proxy, torch.tensor([5, 7]), guess, guess).items()
    assert has_class(proxy, torch.tensor([1, 7])).tolist() == [True, False]


def test_noise_has_the_norms_of_the_victims_layer_by_layer_and_no_direction_of_theirs():
    observed = {"a": torch.randn(2, 64, 8), "b": 5 * torch.randn(2, 32, 8)}
    parts = list(noise_updates(observed, 60, seed=1))
    for name, update in observed.items():
        drawn = torch.cat([part[name] for part in parts])
        assert drawn.shape == (60, *update.shape[1:])
        wanted = update.flatten(1).norm(dim=1).repeat(30)
        torch.testing.assert_close(drawn.flatten(1).norm(dim=1), wanted)
        assert cosine(drawn[::2], update[:1].expand(30, -1, -1)).abs().mean() < 0.1
    again = torch.cat([part["a"] for part in noise_updates(observed, 60, seed=1)])
    assert torch.equal(again, torch.cat([part["a"] for part in parts]))


def test_simulated_sets_take_different_images_of_a_shared_pool():
    pool = torch.arange(5.0).view(5, 1, 1, 1).div(10)
    originals = torch.zeros(2, 1, 1, 1)
    found = simulated_psnr([pool, pool[:4]], originals, None)
    assert found.shape == (2, 4)
    torch.testing.assert_close(found[0], psnr_db(pool[:4], originals[:1]))
    torch.testing.assert_close(found[1], psnr_db(pool[[1, 2, 3, 0]], originals[:1]))


def test_controls_are_matched_to_the_private_images_as_victims_are():
    """Noise that may choose its image scores as well as its best match: matching must not flatter victims alone."""
    candidates = torch.rand(6, 1, 4, 4)
    pool = candidates[[4, 2, 0]]
    found = simulated_psnr([pool, pool], candidates[:2], candidates)
    assert found.shape == (2, 3) and (found > 190).all()
    assert (simulated_psnr([pool, pool], candidates[:2], None) > 190).sum() <= 1


@pytest.fixture(scope="module")
def posed(audited):
    problem, count = adapter_problem(audited.target, audited.adapters), len(audited.proxy)
    pairs = GeneratedPairs(audited.target, problem.a, audited.proxy)
    updates = {name: [] for name in audited.target.names}
    for batch in pairs.batches():
        for name, update in batch.updates.items():
            updates[name].append(update.flatten(1))
    proxies = Proxies(
        {name: torch.cat(parts) for name, parts in updates.items()},
        audited.proxy.batch(slice(0, count)),
        audited.proxy.labels,
        audited.target.base.num_classes,
    )
    return replace(problem, proxies=proxies)


def test_strangers_are_estimated_as_if_they_were_not_in_the_fit(posed, audited, monkeypatch):
    """Against a fit without the stranger, at the same settings; a fit with it returns much of the image."""
    label = int(audited.proxy.labels.mode().values)
    monkeypatch.setattr(module, "LEAST", 5)
    ridge = posed.proxies.ridge
    found = module._strangers(posed, audited.proxy, label, 0, "float32")
    own = torch.nonzero(audited.proxy.labels == label).flatten()
    assert len(found) == len(own)
    row = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[0]]
    keep = torch.arange(len(audited.proxy)) != row
    updates = {name: update[keep] for name, update in posed.proxies.updates.items()}
    fit = ridge._fit(label)
    monkeypatch.setattr(amortised, "_select", lambda *args: fit.choice)
    rest = Proxies(updates, posed.proxies.images[keep], posed.proxies.labels[keep], posed.proxies.num_classes)
    other = rest.ridge
    expected = other._fit(label)(
        other._cosine({n: u[[int(row)]] for n, u in posed.proxies.updates.items()}, slice(None))
    )
    torch.testing.assert_close(
        found[0].flatten(), expected[0].clamp(0, 1), rtol=0, atol=5e-3
    )  # the means differ by 1/N
    assert psnr_db(found[:1], posed.proxies.images[row][None]) < psnr_db(
        ridge.invert({n: u[[int(row)]] for n, u in posed.proxies.updates.items()}).images,
        posed.proxies.images[row][None],
    )


def test_a_label_with_few_proxies_gets_strangers_of_other_images(posed, audited):
    """All labels have fewer than LEAST of the 160 proxies: other images are trained on with the label."""
    label = int(audited.proxy.labels.bincount(minlength=10).argmin())
    simulated = module.simulate(posed, audited.proxy, [label], seed=0, precision="float32")
    assert simulated.strangers[label].shape == (160, 3, 32, 32) and simulated.noise.shape == (200, 3, 32, 32)
    assert set(simulated.strangers) == {label, *simulated.labels.tolist()}
    assert torch.equal(simulated.labels, audited.private.labels)
    for images in (simulated.noise, *simulated.strangers.values()):
        assert torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1


def test_strangers_are_of_the_true_label_where_it_is_known():
    strangers = {1: torch.zeros(1, 1, 1, 1), 2: torch.ones(1, 1, 1, 1)}
    simulated = Simulated(torch.rand(3, 1, 1, 1), strangers, torch.tensor([1, 2, 1]))
    assert [int(p[0]) for p in simulated.pools(slice(0, 3), None)["same_label_stranger"]] == [0, 1, 0]
    assert [int(p[0]) for p in simulated.pools(slice(1, 3), torch.tensor([1, 9]))["same_label_stranger"]] == [0, 0]
