"""The registry: what it finds, in which order it runs, and that a new file is all that a new route needs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from route_cases import posed
from vit_cases import small_vit

from r2f_ext.audit.run import run_audit_stages
from r2f_ext.errors import R2FError
from r2f_ext.inversion import routes
from r2f_ext.inversion.route import Certainty, Problem, adapter_problem
from r2f_ext.inversion.routes import default_routes, needs, registry, run_routes, verdicts_of, with_earlier

GRAY = """
import torch

from r2f_ext.inversion.counting import search_verdict
from r2f_ext.inversion.route import Route
from r2f_ext.types import Reconstruction


class Gray(Route):
    name = "all_gray"
    reads = ("adapters",)
    after = ("amortised",)

    def verdict(self, problem):
        return search_verdict(problem, self.name, "a gray image")

    def run(self, problem, advance):
        images = torch.full_like(problem.found["amortised"].images, 0.5)
        return Reconstruction(self.name, images, None, "gray", 0.0)
"""


@pytest.fixture
def new_route(tmp_path, monkeypatch):
    """A package folder with one more route, and nothing else."""
    (tmp_path / "route_of_a_test.py").write_text(GRAY)
    monkeypatch.setattr(routes, "__path__", [*routes.__path__, str(tmp_path)])


def test_every_route_comes_after_those_that_it_reads():
    found = registry()
    assert {"patch_position", "attention_rowspace", "adapter_rowspace", "matching", "amortised"} < set(found)
    assert {"amortised_refined", "gauss_newton", "gauss_newton_matrix_free", "gauss_newton_unrolled"} < set(found)
    names = list(found)
    for name, route in found.items():
        assert route.name == name
        assert all(names.index(earlier) < names.index(name) for earlier in route.after)


def test_an_audit_runs_a_new_file_without_another_edit(new_route, audited):
    config = replace(audited.config, pairs=60, decoder_pairs=40, routes=(*default_routes(), "all_gray"))
    assert "all_gray" in default_routes()
    result = run_audit_stages(adapter_problem(audited.target, audited.adapters), audited.proxy, config)
    (gray,) = (r for r in result.reconstructions if r.route == "all_gray")
    assert gray.images.shape == (3, 3, 32, 32) and bool((gray.images == 0.5).all())
    assert result.verdicts["all_gray"].certainty is Certainty.PLAUSIBLE and "all_gray" in result.seconds


def test_what_does_not_run_is_listed_with_its_sentence():
    problem, _ = posed()
    names = ("adapter_rowspace", "patch_position", "matching", "gauss_newton_unrolled")
    outcome = run_routes(problem, verdicts_of(problem), names)
    assert [r.route for r in outcome.reconstructions] == ["amortised"]  # read by two of them
    assert set(outcome.not_run) == set(names)
    assert "rank 8 cannot" in outcome.not_run["adapter_rowspace"] or "T = 1" in outcome.not_run["adapter_rowspace"]
    assert "needs exact gradients" in outcome.not_run["patch_position"]
    assert "needs decoded gradients" in outcome.not_run["matching"]
    assert "recipe" in outcome.not_run["gauss_newton_unrolled"]


def test_a_route_whose_start_did_not_run_does_not_run():
    problem, _ = posed()
    without = replace(problem, proxies=None)
    outcome = run_routes(without, verdicts_of(without), ["amortised_refined"])
    assert outcome.reconstructions == [] and "amortised did not run" in outcome.not_run["amortised_refined"]


def test_the_start_of_a_refused_route_is_not_run():
    problem, _ = posed()
    several = replace(problem, steps=2)
    assert with_earlier(["gauss_newton"], verdicts_of(several)) == ["gauss_newton"]
    assert not needs("public", ["gauss_newton"], verdicts_of(several))
    assert set(with_earlier(["gauss_newton"], verdicts_of(problem))) == {
        "amortised",
        "amortised_by_label",
        "amortised_nearby",
        "gauss_newton",
    }
    assert needs("public", ["gauss_newton"], verdicts_of(problem))


def test_where_every_route_failed_the_last_error_is_there_to_be_raised(monkeypatch):
    problem, _ = posed()
    for error in (R2FError("no."), torch.linalg.LinAlgError("svd"), np.linalg.LinAlgError("svd")):

        def run(self, problem, advance, error=error):
            raise error

        monkeypatch.setattr(type(registry()["amortised"]), "run", run)
        outcome = run_routes(problem, verdicts_of(problem), ["amortised"])
        assert outcome.reconstructions == [] and outcome.not_run["amortised"].startswith("Failed: ")
        with pytest.raises(type(error)):
            outcome.found()
    assert run_routes(problem, verdicts_of(problem), ["adapter_rowspace"]).found() == []


def test_an_unknown_name_is_refused():
    problem = Problem(small_vit())
    with pytest.raises(R2FError, match="no route 'nonesuch': name some of adapter_rowspace"):
        run_routes(problem, verdicts_of(problem), ["nonesuch"])


def test_verdicts_need_no_observation():
    for name, verdict in verdicts_of(Problem(small_vit())).items():
        assert verdict.route == name and verdict.why.endswith(".") and isinstance(verdict.identifiable, bool)
        assert verdict.certainty in Certainty


def test_images_lie_in_the_unit_box_and_progress_adds_up():
    problem, images = posed()
    for name, route in registry().items():
        if name not in ("amortised", "amortised_refined"):
            continue
        told = []
        found = route.run(problem, told.append)
        problem = replace(problem, found={**problem.found, name: found})
        assert found.route == name and found.images.shape == images.shape
        assert found.images.min() >= 0 and found.images.max() <= 1
        assert sum(told) in (route.units(problem), route.units(problem) + 1)
        assert torch.equal(found.labels, torch.tensor([2, 2]))


def test_the_help_of_routes_and_the_readme_say_which_run_by_default():
    named = {"gauss_newton", "gauss_newton_unrolled", "gauss_newton_matrix_free"}  # the searches
    named |= {"amortised_by_label", "amortised_nearby"}  # the estimates that only these start from
    assert set(default_routes()) == set(registry()) - named
