import torch

from r2f_ext.audit.metrics import psnr_db
from r2f_ext.inversion.attention_rowspace import invert_attention_rowspace
from r2f_ext.inversion.geometry import FIRST_QKV, QKV_WEIGHT
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.studies import CLOTHES, Row, Table, World
from r2f_ext.studies.questions import cosine
from r2f_ext.studies.questions.cosine import Cosine, Scene, disturbed, isotropic, nines_needed, within_proxies
from r2f_ext.studies.scene import base_of, private_images, public_images, start_of, target_of, victims_of
from r2f_ext.types import Gradient

WORLD = World(quick=True)


def row(metric, values, **keys):
    return Row(keys, metric, tuple(values), min(values), max(values))


def random_gradient(victims, seed):
    generator = torch.Generator().manual_seed(seed)
    return Gradient({"a": torch.randn(victims, 5, 7, generator=generator), "b": torch.randn(victims, 4, 6)})


def test_the_cosine_of_disturbed_gradients_is_as_wanted_in_every_layer():
    true, errors = random_gradient(3, 0), random_gradient(3, 1)
    for wanted in (0.5, 1e-3, 1e-8, 1e-12):
        found = disturbed(true, errors, wanted)
        for name, gradient in found.dense.items():
            ours, exact = (torch.nn.functional.normalize(g.double().flatten(1)) for g in (gradient, true.dense[name]))
            torch.testing.assert_close(
                (ours - exact).square().sum(1) / 2, torch.full((3,), wanted).double(), rtol=1e-2, atol=0
            )


def test_errors_within_the_subspace_are_sums_of_differences_of_proxy_gradients():
    base = base_of(WORLD.base, WORLD.device)
    target = target_of(base, layers=[FIRST_QKV, "blocks.3.mlp.fc2"])
    pairs = GeneratedPairs(target, start_of(target, 0), public_images(base, CLOTHES, 0, 12))
    errors = within_proxies(pairs, 2, torch.Generator().manual_seed(3))
    (batch,) = pairs.batches()
    for name in target.names:
        scaled = batch.gradients.dense(name) / batch.updates[name].flatten(1).norm(dim=1)[:, None, None]
        differences = (scaled - scaled.mean(0)).flatten(1).double()
        wanted = errors.dense[name].flatten(1).double()
        fitted = torch.linalg.lstsq(differences.mT, wanted.mT, driver="gelsd").solution
        assert (differences.mT @ fitted - wanted.mT).norm() < 1e-5 * wanted.norm()


def test_bisection_ends_where_the_closed_form_crosses_the_level():
    base = base_of(WORLD.base, WORLD.device)
    target = target_of(base)
    a = start_of(target, 0)
    public = public_images(base, CLOTHES, 0, 20)
    victims = victims_of(target, a, private_images(base, CLOTHES, 0, 2))
    errors = isotropic(victims.gradient, torch.Generator().manual_seed(0))
    scene = Scene(target, a, victims, public, {}, {}, None, torch.zeros(2))
    (found,) = nines_needed(scene, errors, 33.0)
    for victim, nines in enumerate(found.values):
        for shift, reached in ((0.0, True), (-0.2, False)):
            gradient = disturbed(victims.gradient, errors, 10 ** -(nines + shift)).dense[FIRST_QKV][victim]
            image = invert_attention_rowspace(base, {QKV_WEIGHT: gradient}).images
            assert bool(psnr_db(image, scene.images[victim, None]) >= 33) == reached


def test_same_seed_same_figures(monkeypatch):
    monkeypatch.setattr(cosine, "QUICK_PAIRS", 40)
    study, setting = Cosine(), {"error": "isotropic", "one_minus_cosine": 0.1}
    first = study.measure(WORLD, setting, 1)
    cosine.scene_of.cache_clear()
    assert study.measure(WORLD, setting, 1) == first
    cosine.scene_of.cache_clear()
    assert {one.labels["route"] for one in first} >= {"amortised", "attention_rowspace", "mean_image", "stranger"}


def test_conclusions_follow_the_table():
    def of(decoder, needed):
        return Table(
            [
                row("nines", [decoder], error="as decoded", of="ridge"),
                row("nines", [needed, needed + 1], error="isotropic", level_db=33.0, of="closed form, 33 dB"),
                row("psnr_db", [9.0, 10.0], error="isotropic", one_minus_cosine=0.1, route="amortised"),
                row("psnr_db", [19.0, 20.0], error="isotropic", one_minus_cosine=1e-8, route="amortised"),
            ]
        )

    study = Cosine()
    assert study.conclude(WORLD, of(1.3, 10.3))[0].startswith("No decoder is precise enough")
    assert study.conclude(WORLD, of(12.0, 10.3))[0].startswith("A decoder is precise enough")
    last = study.conclude(WORLD, of(1.3, 10.3))[-1]
    assert "19.5" in last and "at 1 - cos = 1e-08, 9.5" in last
    assert study.conclude(WORLD, Table([])) == []
    assert study.conclude(WORLD, Table([row("nines", [1.0], error="as decoded", of="ridge")])) == []
