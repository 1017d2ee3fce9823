"""The weights of the base: PEFT's own victims of this base fit them whatever the image, those of others never do."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import cosine, peft_model, proxy_set, save, target_of, train, victim
from transformers_cases import classifier

from r2f_ext.audit import base_check
from r2f_ext.audit.base_check import NO_LAYER, NO_PROXIES, OTHER_LAYERS, check_base, relations, residual
from r2f_ext.audit.controls import noise_updates
from r2f_ext.audit.run import run_audit_stages
from r2f_ext.audit.sets import set_report
from r2f_ext.audit.verdict import ANOTHER_BASE, UNSCORED
from r2f_ext.capture import Capture
from r2f_ext.config import AuditConfig
from r2f_ext.data import load_images
from r2f_ext.inversion.route import Proxies, adapter_problem
from r2f_ext.models import attach, load_base, read_adapter
from r2f_ext.models.embedded import build_embedded_vit, reset_head
from r2f_ext.pairs import GeneratedPairs

LAYERS = ["attn.qkv", "attn.proj"]
LAYER = "blocks.3.attn.proj"


def problem_of(base, folders, precision="float32"):
    """The problem of adapters audited on `base`, with a few proxies made there."""
    bound = [attach(read_adapter(folder), base) for folder in folders]
    found = adapter_problem(bound[0][0], [update for _, update in bound])
    images = proxy_set(20, found.base)
    batches = [batch.updates for batch in GeneratedPairs(found.target, found.a, images, precision=precision).batches()]
    updates = {name: torch.cat([batch[name].flatten(1) for batch in batches]) for name in found.target.names}
    return replace(found, proxies=Proxies(updates, images.batch(slice(None)), images.labels, found.base.num_classes))


def pictures():
    """name -> images [1, 3, 32, 32]: near to the base's training data, far from it, and nothing like an image."""
    generator = torch.Generator().manual_seed(4)
    return {
        "clothes": load_images("embedded", role="private", count=1).batch([0]),
        "face": load_images("lfw", role="private", count=1).batch([0]),
        "noise": torch.rand(1, 3, 32, 32, generator=generator),
        "flat": torch.full((1, 3, 32, 32), 0.5),
        "black": torch.zeros(1, 3, 32, 32),
    }


@pytest.fixture(scope="module")
def other(embedded):
    """The architecture of the embedded base with other weights."""
    torch.manual_seed(1)
    model = build_embedded_vit().eval().requires_grad_(False)
    reset_head(model)
    return replace(embedded, model=model)


@pytest.fixture(scope="module")
def folders(embedded, other, tmp_path_factory):
    """Victims of either base: (base, picture) -> folder."""
    tmp = tmp_path_factory.mktemp("victims")
    return {
        (name, picture): victim(base, tmp / name / picture, image, torch.tensor([3]), target_modules=LAYERS)
        for name, base in (("own", embedded), ("other", other))
        for picture, image in pictures().items()
    }


def test_every_picture_fits_its_own_base_and_none_another(embedded, other, folders):
    for trained, audited in (("own", embedded), ("other", other)):
        own = check_base(problem_of(audited, [folders[trained, picture] for picture in pictures()]))
        assert own.layer == LAYER and own.fits == (True,) * 5 and max(own.residuals) < 1e-6
        assert own.refusal is None and OTHER_LAYERS in own.notes[0] and "5 of 5 updates fit" in own.notes[0]
    for trained, audited in (("other", embedded), ("own", other)):
        found = check_base(problem_of(audited, [folders[trained, picture] for picture in pictures()]))
        assert found.fits == (False,) * 5 and min(found.residuals) > 0.9 and found.notes == ()
        assert "5 of 5 updates cannot come from one step" in found.refusal and "or more" in found.refusal
    one = check_base(problem_of(embedded, [folders["other", "face"]]))
    assert one.refusal.startswith("The update cannot come from one step of plain SGD on one image at this base's")
    assert f"broken by {one.residuals[0]:.0%} of the norm, and by" in one.refusal and bool(one.foreign.all())


def test_the_relation_is_that_of_autograds_gradients(embedded):
    """W_o,h^T d is the direction of every column of head h's gradient at the values, d that of the projection's."""
    images = proxy_set(3, embedded)
    target = target_of(embedded, ("blocks.3.attn.qkv", LAYER), rank=8)
    with Capture(target) as capture:
        found = capture(images.batch(slice(None))[:, None], images.labels[:, None])
    weight = embedded.model.blocks[3].attn.proj.weight
    heads = embedded.model.blocks[3].attn.num_heads
    values = found.dense("blocks.3.attn.qkv")[:, 256:].unflatten(1, (heads, -1))
    for row in range(3):
        d = found.delta[LAYER][row].sum(0)  # the class token's alone
        expected = (weight.T @ d).unflatten(0, (heads, -1))
        for head in range(heads):
            left = torch.linalg.svd(values[row, head])[0][:, 0]
            assert float(cosine(left[None], expected[head][None]).abs()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("moved", "fits"), [(1e-5, None), (1e-3, None), (1.0, False)])
def test_a_base_that_was_moved_does_not_fit(embedded, folders, moved, fits):
    model = copy.deepcopy(embedded.model)
    torch.manual_seed(0)
    with torch.no_grad():
        weight = model.blocks[3].attn.proj.weight
        weight += moved * weight.std() * torch.randn_like(weight)
    found = check_base(problem_of(replace(embedded, model=model), [folders["own", "clothes"]]))
    assert found.fits == (fits,) and found.residuals[0] > 0.5 * moved / (1 + moved)
    if fits is None:
        assert "not decided for the update" in found.notes[0] and "slightly other weights" in found.notes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_not_taken_for_another_base(embedded, dtype, tmp_path):
    """Trained and stored in low precision: not refuted, and proxies in bfloat16 still show the relation."""
    model = peft_model(replace(embedded, model=copy.deepcopy(embedded.model)), target_modules=LAYERS).to(dtype)
    image = pictures()["clothes"].to(dtype)
    train(model, embedded, image, torch.tensor([3]))
    folder = save(model, tmp_path / "low")
    for precision in ("float32", "bfloat16"):
        found = check_base(problem_of(embedded, [folder], precision))
        assert found.layer == LAYER and found.fits[0] is not False and found.residuals[0] < 0.02


def test_several_images_steps_and_noise_are_not_taken_for_another_base(embedded, tmp_path):
    clothes = load_images("embedded", role="private", count=16)
    options = {"target_modules": LAYERS}
    few = victim(embedded, tmp_path / "few", clothes.batch(slice(0, 2)), clothes.labels[:2], **options)
    found = check_base(problem_of(embedded, [few]))
    assert found.fits == (None,) and "2 directions" in found.notes[0] and "several images" in found.notes[0]
    many = victim(embedded, tmp_path / "many", clothes.batch(slice(None)), clothes.labels, **options)
    assert check_base(problem_of(embedded, [many])).fits == (None,)
    steps = victim(embedded, tmp_path / "steps", clothes.batch([0]), clothes.labels[:1], steps=20, **options)
    problem = problem_of(embedded, [steps])
    assert problem.steps is None
    found = check_base(problem)
    assert found.fits == (None,) and "more than one step" in found.notes[0]
    (noise,) = noise_updates(problem_of(embedded, [few]).observed, 1, seed=0)
    found = check_base(replace(problem_of(embedded, [few]), observed=noise))
    assert found.fits == (None,) and "8 directions" in found.notes[0] and "noise" in found.notes[0]


def test_the_signs_of_adam_are_not_taken_for_another_base(embedded, tmp_path):
    model = peft_model(embedded, target_modules=LAYERS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    logits = model(embedded.normalize(pictures()["clothes"]))
    torch.nn.functional.cross_entropy(logits, torch.tensor([3])).backward()
    optimizer.step()
    found = check_base(problem_of(embedded, [save(model, tmp_path / "adam")]))
    assert found.fits == (None,) and found.residuals[0] > 0.1 and "another optimiser" in found.notes[0]


def test_of_several_adapters_each_is_counted_once(embedded, other, folders):
    mixed = [folders["own", "face"], folders["other", "face"], folders["other", "flat"]]
    found = check_base(problem_of(embedded, mixed))
    assert found.fits == (True, False, False) and found.foreign.tolist() == [False, True, True]
    assert "2 of 3 updates (numbers 2, 3) cannot come" in found.refusal and "1 of 3 updates fits" in found.notes[0]


@pytest.mark.parametrize("layers", [["attn.qkv"], ["attn.proj"], ["mlp.fc1", "mlp.fc2"]])
def test_without_the_two_layers_it_is_said_that_nothing_was_checked(embedded, layers, tmp_path):
    folder = victim(embedded, tmp_path / "a", pictures()["clothes"], torch.tensor([3]), target_modules=layers)
    found = check_base(problem_of(embedded, [folder]))
    assert found.layer is None and found.fits == (None,) and found.notes == (NO_LAYER,) and found.residuals == ()


@pytest.mark.parametrize("family", ["vit", "deit", "beit", "dinov2", "clip", "siglip"])
def test_families_of_transformers(family, tmp_path):
    """A class token: the right weights fit and other ones do not. Heads that read all tokens: nothing is claimed."""
    bases = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        classifier(family, seed).save_pretrained(folder)
        bases.append(load_base(str(folder)))
    output = "out_proj" if family in ("clip", "siglip") else "o_proj"
    image = torch.rand(1, *bases[0].input_shape, generator=torch.Generator().manual_seed(0))
    adapter = victim(
        bases[0], tmp_path / "a", image, torch.tensor([1]), target_modules=["q_proj", "k_proj", "v_proj", output]
    )
    right, wrong = (check_base(problem_of(base, [adapter])) for base in bases)
    if family in ("vit", "deit"):
        assert right.layer == wrong.layer and right.layer.endswith(f"layers.1.attention.{output}")
        assert right.fits == (True,) and wrong.fits == (False,)
    else:
        assert right.layer is None and wrong.layer is None and right.notes == (NO_LAYER,)


def test_a_layer_that_does_not_obey_the_relation_is_not_used(embedded, folders):
    """The earlier blocks' projections have gradients at every token."""
    problem = problem_of(embedded, [folders["own", "clothes"]])
    found = {one.outer: residual(one, problem.observed) for one in relations(problem.target)}
    assert {f"blocks.{block}.attn.proj" for block in range(4)} <= set(found)
    assert bool(found[LAYER].one_image.all())
    for name, one in found.items():
        assert name == LAYER or float(one.relative.min()) > 0.1


def test_without_proxies_nothing_is_checked(embedded, folders):
    found = check_base(replace(problem_of(embedded, [folders["own", "clothes"]]), proxies=None))
    assert found.fits == (None,) and found.notes == (NO_PROXIES,) and found.refusal is None


def test_a_failure_leaves_a_sentence(embedded, folders, monkeypatch):
    def fails(*args):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(base_check, "residual", fails)
    found = check_base(problem_of(embedded, [folders["own", "clothes"]]))
    assert found.layer is None and found.notes == ("The weights of the base could not be checked: no convergence.",)


def test_the_report_does_not_blame_the_images_for_another_base(embedded, folders):
    proxy, private = load_images("embedded", count=60), load_images("embedded", role="private", count=1)
    config = AuditConfig(pairs=60, decoder_pairs=40, held_out=10, routes=("amortised",))
    target, update = attach(read_adapter(folders["other", "clothes"]), embedded)
    result = run_audit_stages(adapter_problem(target, [update]), proxy, config)
    assert not any("base's weights" in one for one in result.notes)
    for given in (private, None):
        part = set_report("a", result, proxy, given)
        assert part.judgement.leak is None and part.figures.verdict.startswith("The update cannot come from one step")
        assert part.judgement.sentences[1] == ANOTHER_BASE
        said = (*part.judgement.sentences, *part.notes, *result.notes)
        assert not any("proxy may not fit" in one or "No leak" in one or "nearer to" in one for one in said)
    right = replace(result, base_check=replace(result.base_check, fits=(True,), sentences=("It fits.",)))
    part = set_report(
        "a", replace(right, estimates=replace(result.estimates, far=torch.ones(1, dtype=torch.bool))), proxy, None
    )
    assert part.judgement.sentences == (UNSCORED,)
    assert f"other layers than {LAYER} are not those of the training" in part.notes[0]
    open_ = replace(result.base_check, fits=(None,), sentences=("It is open.",))
    part = set_report(
        "a",
        replace(right, base_check=open_, estimates=replace(result.estimates, far=torch.ones(1, dtype=torch.bool))),
        proxy,
        None,
    )
    assert "the base or the recipe is not the adapter's" in part.notes[0]
