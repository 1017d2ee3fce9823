"""`invert` as a function; what it refuses and prints is tested with `r2f invert`."""

import torch
from safetensors.torch import load_file

from r2f_ext.audit.invert import invert
from r2f_ext.config import AuditConfig
from r2f_ext.decoders import stack_updates
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.matching import MatchingConfig
from r2f_ext.inversion.task import GaussNewtonConfig
from r2f_ext.models import load_adapter, load_base
from r2f_ext.pairs import StoredPairs

CONFIG = AuditConfig(
    routes=("amortised_refined",), refinement=MatchingConfig(steps=2), search=GaussNewtonConfig(minutes=1.0)
)


def test_the_estimate_is_the_regression_on_the_stored_pairs(stages):
    found = invert(stages.adapter, stages.pairs, config=CONFIG)
    assert [part.route for part in found.reconstructions] == ["amortised", "amortised_refined"]
    assert found.not_run == {} and found.far.tolist() == [False]
    _, update = load_adapter(stages.adapter, load_base())
    pairs = StoredPairs(stages.pairs, load_base())
    images, labels = pairs.samples()
    ridge = AmortisedInverter(pairs.updates(0, len(pairs)), images, labels, 10)
    torch.testing.assert_close(found.reconstructions[0].images, ridge.invert(stack_updates([update])).images)


def test_the_settings_reach_the_routes(stages):
    problem = invert(stages.adapter, stages.pairs, config=CONFIG).problem
    assert (problem.refinement, problem.matching) == (CONFIG.refinement, CONFIG.matching)
    assert problem.gauss_newton == CONFIG.search and problem.saved is None
    assert problem.matrix_free.minutes == CONFIG.search.minutes == 1.0


def test_the_images_are_written_only_into_a_folder_that_was_named(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invert(stages.adapter, stages.pairs, config=CONFIG)
    assert list(tmp_path.iterdir()) == []
    found = invert(stages.adapter, stages.pairs, config=CONFIG, out="images")
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["amortised.png", "amortised_refined.png", "images.safetensors"]
    written = load_file(tmp_path / "images" / "images.safetensors")
    assert all(torch.equal(written[part.route], part.images) for part in found.reconstructions)
