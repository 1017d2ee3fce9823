"""A small audit of real victims: what each stage handed on."""

from dataclasses import asdict, replace

import pytest
import torch
from cases import cosine, proxy_set

from r2f_ext.audit import run as module
from r2f_ext.audit.run import generate, run_audit_stages
from r2f_ext.audit.sets import set_report
from r2f_ext.capture import Capture
from r2f_ext.data import content_hashes, drop_private
from r2f_ext.decoders import Projection, Ridge, RowLMMSE, held_out_cosines, stack_updates
from r2f_ext.errors import R2FError
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.inversion.route import Certainty, Verdict, adapter_problem
from r2f_ext.inversion.routes import registry
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import LoraUpdate, Reconstruction

pytestmark = pytest.mark.usefixtures("few_controls")

KINDS = {"projection", "row_lmmse", "ridge"}


def pairs_of(audited) -> GeneratedPairs:
    return GeneratedPairs(audited.target, audited.adapters[0].a, audited.proxy)


def test_what_comes_out(audited):
    result = audited.result
    assert result.pair_count == 120 and result.pairs_per_second > 0
    assert [r.route for r in result.reconstructions] == ["amortised", "amortised_refined", "matching"]
    for reconstruction in result.reconstructions:
        assert reconstruction.images.shape == (3, 3, 32, 32) and torch.isfinite(reconstruction.images).all()
        assert reconstruction.images.min() >= 0 and reconstruction.images.max() <= 1
    assert set(result.decoders) == set(audited.target.names)
    assert set(result.seconds) == {
        "pairs",
        "decoders",
        "decode",
        "amortised",
        "matching",
        "amortised_refined",
        "control",
    }
    assert set(result.not_run) == {"adapter_rowspace", "attention_rowspace", "patch_position"}
    assert "Not exact" in result.not_run["adapter_rowspace"]
    assert result.verdicts["gauss_newton"].identifiable
    assert result.notes == (*audited.result.problem.evidence.sentences, *result.base_check.notes)
    assert result.estimates.stranger.shape == (1, 3, 32, 32) and result.failed == {}


def test_scores_are_held_out(audited):
    """The figures are those of decoders fitted to pairs 0-89 and asked about pairs 90-109."""
    pairs = pairs_of(audited)
    for kind, decoder in (("projection", Projection()), ("ridge", Ridge())):
        decoder.fit(pairs, 90)
        asked = {n: torch.cat([b.updates[n] for b in pairs.batches(90, 110)]) for n in pairs.target.names}
        expected = held_out_cosines(decoder.decode(asked), pairs, 90, 110).summary()
        for name, figures in expected.items():
            found = audited.result.decoders[name][kind]
            for figure, value in asdict(figures).items():
                assert getattr(found, figure) == pytest.approx(value, abs=1e-3)
    for figures in audited.result.decoders.values():
        assert set(figures) == KINDS
        means = {kind: figures[kind].cosine_mean for kind in KINDS}
        assert means["projection"] < means["row_lmmse"] < 1 and means["projection"] < means["ridge"] < 1


def test_decoded_gradients_point_along_the_victims_true_ones(audited):
    private = audited.private
    with Capture(audited.target) as capture:
        true = capture(private.batch(slice(None))[:, None], private.labels[:, None])
    observed = stack_updates(audited.adapters)
    floor = Projection()
    floor.start(pairs_of(audited), 0)
    floor_gradients = floor.decode(observed).dense
    for name, gradient in audited.result.scored.decoded.dense.items():
        assert gradient.shape == (3, 384, 128)
        assert cosine(gradient, true.dense(name)).mean() > cosine(floor_gradients[name], true.dense(name)).mean() + 0.2


def test_generate_walks_once_and_keeps_every_update(audited):
    pairs, units, failed = pairs_of(audited), [], {}
    updates = generate(pairs, 50, {"projection": Projection()}, 30, units.append, failed)
    expected = torch.cat([b.updates[pairs.target.names[1]] for b in pairs.batches(0, 50)]).flatten(1)
    torch.testing.assert_close(updates[pairs.target.names[1]], expected, rtol=1e-3, atol=1e-6)
    assert sum(units) == 50 and failed == {}


def test_the_same_seed_gives_the_same_audit(audited):
    again = run_audit_stages(adapter_problem(audited.target, audited.adapters), audited.proxy, audited.config)
    for first, second in zip(audited.result.reconstructions, again.reconstructions, strict=True):
        assert (first.images - second.images).abs().mean() < 1e-3


def test_another_seed_draws_another_stranger(audited):
    other = run_audit_stages(
        adapter_problem(audited.target, audited.adapters[:1]), audited.proxy, replace(audited.config, seed=5)
    )
    assert not torch.allclose(other.estimates.stranger, audited.result.estimates.stranger, atol=1e-3)


def test_private_images_never_reach_the_proxy(audited):
    mixed = replace(
        audited.proxy,
        images=torch.cat([audited.private.images, audited.proxy.images]),
        labels=torch.cat([audited.private.labels, audited.proxy.labels]),
    )
    left = drop_private(mixed, audited.private)
    assert torch.equal(left.images, audited.proxy.images)
    assert not set(content_hashes(left.images)) & set(content_hashes(audited.private.images))


def test_a_drifted_a_is_said_to_stand_in_for_the_start(audited):
    drifted = [moved(update, lambda a: {n: t * 1.2 for n, t in a.items()}) for update in audited.adapters]
    config = replace(audited.config, pairs=60, decoder_pairs=40, routes=("amortised",))
    result = run_audit_stages(adapter_problem(audited.target, drifted), audited.proxy, config)
    assert [r.route for r in result.reconstructions] == ["amortised"]
    assert any("their mean A stands in" in note for note in result.notes)
    assert "more than one step" in result.verdicts["gauss_newton"].why


def moved(update, change):
    return LoraUpdate(change(dict(update.a)), dict(update.b))


@pytest.mark.parametrize("difference", ["values", "fewer layers", "more layers", "rank"])
def test_adapters_of_other_starts_are_refused(audited, difference):
    first, second, _ = audited.adapters
    name = audited.target.names[0]
    if difference == "values":
        second = moved(second, lambda a: a | {name: torch.randn_like(a[name])})
    elif difference == "rank":
        second = moved(second, lambda a: a | {name: a[name][:4]})
    elif difference == "fewer layers":
        second = moved(second, lambda a: {n: t for n, t in a.items() if n != name})
    else:
        second = moved(second, lambda a: a | {"blocks.9": a[name]})
    with pytest.raises(R2FError, match="audit them one by one"):
        adapter_problem(audited.target, [first, second])


def test_too_small_a_proxy(audited):
    with pytest.raises(R2FError, match="gives 39 pairs: at least 40"):
        run_audit_stages(
            adapter_problem(audited.target, audited.adapters), proxy_set(39, audited.target.base), audited.config
        )


def failing(error):
    def run(self, problem, advance):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "words"),
    [(R2FError("no such thing."), "no such thing."), (RuntimeError("CUDA out of memory."), "memory")],
)
def test_a_route_that_fails_leaves_the_others_and_says_so(audited, monkeypatch, error, words):
    monkeypatch.setattr(type(registry()["matching"]), "run", failing(error))
    config = replace(audited.config, pairs=60, decoder_pairs=40, routes=("amortised", "matching"))
    result = run_audit_stages(adapter_problem(audited.target, audited.adapters), audited.proxy, config)
    assert [found.route for found in result.reconstructions] == ["amortised"]
    assert result.not_run["matching"].startswith("Failed: ") and words in result.not_run["matching"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_bug_or_an_interrupt_ends_the_audit(audited, monkeypatch, error):
    monkeypatch.setattr(type(registry()["amortised"]), "run", failing(error))
    config = replace(audited.config, pairs=60, decoder_pairs=40, routes=("amortised",))
    with pytest.raises(type(error)):
        run_audit_stages(adapter_problem(audited.target, audited.adapters), audited.proxy, config)


SMALL = {"pairs": 60, "decoder_pairs": 40, "held_out": 10}


def small_audit(audited, *routes, **config):
    config = replace(audited.config, **SMALL, routes=routes, **config)
    return run_audit_stages(adapter_problem(audited.target, audited.adapters), audited.proxy, config)


def test_where_every_route_fails_the_result_says_so(audited, monkeypatch):
    monkeypatch.setattr(type(registry()["amortised"]), "run", failing(R2FError("no such thing.")))
    result = small_audit(audited, "amortised")
    assert result.reconstructions == [] and result.not_run == {"amortised": "Failed: no such thing."}
    assert result.estimates is not None and result.scored.decoded is not None


@pytest.mark.parametrize("step", ["observe", "decode"])
def test_a_decoder_that_fails_takes_only_its_own_figures_and_routes(audited, monkeypatch, step):
    monkeypatch.setattr(Ridge, step, failing_step(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
    result = small_audit(audited, "amortised", "matching")
    sentence = "The decoder ridge failed, so there are no decoded gradients: out of memory."
    assert result.failed == {"ridge": sentence} and result.notes[0] == sentence
    assert result.not_run == {"matching": f"Not run: t{sentence[1:]}"}
    assert [found.route for found in result.reconstructions] == ["amortised"] and result.simulated is not None
    assert all(set(kinds) == {"projection", "row_lmmse"} for kinds in result.decoders.values())
    part = set_report("x", result, audited.proxy, audited.private)
    assert part.judgement.leak is not None and {len(kinds) for kinds in part.true_cosines.values()} == {2}


def failing_step(error):
    def step(self, *args):
        raise error

    return step


def test_another_decoder_that_fails_leaves_the_decoded_gradients(audited, monkeypatch):
    monkeypatch.setattr(RowLMMSE, "finish", failing_step(R2FError("a system is not positive definite: take more.")))
    result = small_audit(audited, "amortised", "matching")
    assert list(result.failed) == ["row_lmmse"] and "so its figures are missing: a system" in result.notes[0]
    assert result.scored.decoded is not None and len(result.reconstructions) == 2
    assert all(set(kinds) == {"projection", "ridge"} for kinds in result.decoders.values())


def test_scores_that_fail_leave_the_routes_that_need_no_decoder(audited, monkeypatch):
    monkeypatch.setattr(module, "score_and_decode", failing_step(MemoryError()))
    result = small_audit(audited, "amortised", "matching")
    assert list(result.failed) == ["decode"] and "could not be scored" in result.not_run["matching"]
    assert [found.route for found in result.reconstructions] == ["amortised"]


@pytest.mark.parametrize(
    ("error", "why"),
    [(MemoryError(), "out of memory."), (torch.linalg.LinAlgError("svd"), "a matrix cannot be decomposed (svd).")],
)
def test_pairs_that_fail_leave_what_needs_none(audited, monkeypatch, error, why):
    monkeypatch.setattr(GeneratedPairs, "batches", failing_step(error))
    result = small_audit(audited, "amortised", "amortised_refined", "matching")
    sentence = f"No proxy pairs could be made, so nothing that needs them was done: {why}"
    assert result.failed == {"pairs": sentence} and result.pair_count == result.pairs_per_second == 0
    assert result.not_run["amortised"] == result.not_run["matching"] == f"Not run: n{sentence[1:]}"
    assert "amortised did not run" in result.not_run["amortised_refined"]
    assert result.reconstructions == [] and result.estimates is result.simulated is result.scored.decoded is None
    assert set(result.verdicts) == set(registry()) and audited.result.problem.evidence.sentences[0] in result.notes
    part = set_report("x", result, audited.proxy, audited.private)
    assert part.figures.verdict == f"Not judged: n{sentence[1:]}" and part.count == 3 and part.originals is None


def test_what_other_routes_find_without_pairs_is_scored(audited, monkeypatch):
    monkeypatch.setattr(GeneratedPairs, "batches", failing_step(MemoryError()))
    route = type(registry()["adapter_rowspace"])
    monkeypatch.setattr(route, "verdict", lambda self, problem: Verdict("adapter_rowspace", Certainty.EXACT, 1, 1, "."))
    images = audited.private.batch([0, 1, 2])
    found = Reconstruction("adapter_rowspace", images, None, "test", 0.0)
    monkeypatch.setattr(route, "run", lambda self, problem, advance: found)
    part = set_report("x", small_audit(audited, "adapter_rowspace"), audited.proxy, audited.private)
    assert part.figures.routes["adapter_rowspace"].psnr_db_mean > 90 and part.controls is None
    assert part.judgement.leak is None and "out of memory" in part.figures.verdict


def test_estimates_that_fail_leave_the_reconstructions(audited, monkeypatch):
    monkeypatch.setattr(AmortisedInverter, "far_from_proxy", failing_step(R2FError("no.")))
    result = small_audit(audited, "amortised")
    assert list(result.failed) == ["estimates"] and len(result.reconstructions) == 1 and result.simulated is None
    part = set_report("x", result, audited.proxy, audited.private)
    assert part.figures.verdict == "Not judged: the judged route gave no estimates, so nothing is judged: no."


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug"), RuntimeError("a bug")])
def test_a_bug_or_an_interrupt_in_a_stage_ends_the_audit(audited, monkeypatch, error):
    for place in (GeneratedPairs, Ridge):
        with monkeypatch.context() as patch:
            patch.setattr(place, "batches" if place is GeneratedPairs else "finish", failing_step(error))
            with pytest.raises(type(error)):
                small_audit(audited, "amortised")


def test_an_update_that_is_not_finite_is_named(audited):
    pairs = pairs_of(audited)

    class Broken:
        target, a = pairs.target, pairs.a

        def batches(self, start, stop):
            for batch in pairs.batches(start, stop):
                batch.updates[pairs.target.names[1]][4] = float("nan")
                yield batch

    with pytest.raises(R2FError, match=rf"the update of {pairs.target.names[1]} by proxy image 4 is not finite"):
        generate(Broken(), 50, {}, 30, lambda units: None, {})


def test_controls_that_cannot_be_simulated_leave_the_verdict_open(audited, monkeypatch):
    def simulate(*args):
        raise R2FError("not positive definite.")

    monkeypatch.setattr(module, "simulate", simulate)
    config = replace(audited.config, pairs=60, decoder_pairs=40, routes=("amortised",))
    result = run_audit_stages(adapter_problem(audited.target, audited.adapters), audited.proxy, config)
    assert result.simulated is None
    assert result.notes[0] == "The controls could not be simulated: not positive definite."
    part = set_report("x", result, audited.proxy, audited.private)
    assert part.judgement.leak is None and "could not be simulated" in part.figures.verdict
    assert set(part.figures.controls) == {"mean_image", "class_mean", "nearest_proxy", "shuffled_adapter"}
