"""Study `decoder`: what its settings measure, and what it concludes from tables of both outcomes."""

import pytest
import torch
import torch.nn.functional as F

from r2f_ext.decoders import MLP, AgnosticPairs, ConcatenatedPairs, ProductPairs, Ridge, UNet
from r2f_ext.studies import CLOTHES, Table, World
from r2f_ext.studies.questions import decoder as module
from r2f_ext.studies.questions.decoder import DecoderStudy
from r2f_ext.studies.scene import ClassMean

QUICK = World(quick=True)
STUDY = DecoderStudy()


def setting(**keys):
    plain = {"data": "clothes", "set": "first", "starts": "one for all", "pairs": 60, "decoder": "ridge"}
    return {**plain, "inputs": "B", "loss": "closed form", **keys}


def table_of(*rows):
    """Victims' cosines: (setting, values)."""
    made = [{"metric": "cosine", "values": values, "labels": {"images": "victims"}} for _, values in rows]
    return Table.of([{"setting": keys, "seed": 0, "measured": [m]} for (keys, _), m in zip(rows, made, strict=True)])


def test_every_part_of_the_question_has_settings():
    found = STUDY.settings(World())
    assert {each["decoder"] for each in found} >= {"mlp", "conv", "unet", "ridge", "kernel_ridge", "row_lmmse"}
    assert {each["loss"] for each in found} == {"closed form", "1 - cos", "MSE", "1 - cos + log-norm"}
    assert {each["inputs"] for each in found} == {"B", "BA", "A and B", "G P_A"}
    assert {each["data"] for each in found} == {"clothes", "faces", "photos"}
    for each in found:  # beside every decoder, the class mean of the same pairs
        floor = {**each, "decoder": "class_mean_gradient", "loss": "closed form"}
        floor["inputs"] = "B" if each["starts"] == "one for all" else "A and B"
        assert floor in found


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"decoder": "class_mean_gradient"}, ClassMean),
        ({"decoder": "ridge"}, Ridge),
        ({"decoder": "unet", "loss": "MSE"}, UNet),
        ({"decoder": "mlp", "loss": "1 - cos", "inputs": "BA"}, MLP),
    ],
)
def test_a_setting_names_its_decoder(keys, kind):
    made = module._decoder(setting(**keys), 3, 2)
    assert type(made) is kind
    if keys.get("loss"):
        assert made.loss == {"MSE": "mse", "1 - cos": "cosine"}[keys["loss"]] and (made.seed, made.epochs) == (3, 2)
    if kind is MLP:
        assert made.form == "ba"


def test_figures_are_those_of_decoded_and_true_gradients():
    """Against the decoder of the same pairs, fitted here, and plain cosines."""
    found = {(m.metric, m.labels["images"]): m.values for m in STUDY.measure(QUICK, setting(decoder="row_lmmse"), 0)}
    scene, kept = module._scene(QUICK, CLOTHES, 0), module._kept(QUICK, CLOTHES, 0, False)
    decoder = module._decoder(setting(decoder="row_lmmse"), 0, None)
    decoder.fit(kept.pairs, 60)
    decoded = decoder.decode(scene.victims.updates)
    cosines, errors = [], []
    for name in kept.pairs.target.names:
        one, two = decoded.dense[name].flatten(1), scene.victims.gradient.dense[name].flatten(1)
        cosines.append(F.cosine_similarity(one, two))
        errors.append((one.norm(dim=1) / two.norm(dim=1) - 1).abs())
    layers = torch.stack(cosines)
    assert found["cosine", "victims"] == pytest.approx(layers.mean(0).tolist(), abs=1e-5)
    assert found["cosine_worst_layer", "victims"] == pytest.approx(layers[layers.mean(1).argmin()].tolist(), abs=1e-5)
    assert found["norm_error", "victims"] == pytest.approx(torch.stack(errors).mean(0).tolist(), abs=1e-5)
    assert len(found["cosine", "held-out proxies"]) == module.QUICK_HELD_OUT
    low = torch.tensor(found["cosine", "held-out proxies"]).quantile(0.05)
    assert found["cosine_p05", "held-out proxies"] == pytest.approx([float(low)], abs=1e-5)


def test_proxies_with_an_a_each_hold_the_same_gradients_and_the_victims_a_is_none_of_theirs():
    scene = module._scene(QUICK, CLOTHES, 0)
    same, each = (module._kept(QUICK, CLOTHES, 0, other).pairs for other in (False, True))
    name = same.target.names[0]
    (one,), (two,) = (list(pairs.batches(0, 5)) for pairs in (same, each))
    torch.testing.assert_close(one.gradients.dense(name), two.gradients.dense(name), rtol=1e-3, atol=1e-7)
    assert all(not torch.equal(a, scene.a[name]) for a in two.a0[name])
    forms = (ProductPairs, ConcatenatedPairs, AgnosticPairs)
    assert tuple(module.FORMS[inputs] for inputs in ("BA", "A and B", "G P_A")) == forms


GOOD, MIDDLE, BAD = [0.9, 0.92, 0.91], [0.7, 0.72, 0.73], [0.3, 0.2, 0.25]


def test_a_decoder_below_the_class_mean_comes_first():
    said = STUDY.conclude(
        QUICK,
        table_of(
            (setting(decoder="class_mean_gradient"), MIDDLE),
            (setting(decoder="projection"), BAD),
            (setting(decoder="row_lmmse"), BAD),
            (setting(), GOOD),
        ),
    )
    assert (
        said[0].startswith("Not shown to be above the mean gradient of the victim's class")
        and "row_lmmse of B" in said[0]
    )
    assert "ridge" not in said[0]
    assert (
        said[1].startswith("Victims of clothes: best is ridge of B (clothes), 60 pairs")
        and "projection 0.250" in said[1]
    )


def test_decoders_that_all_beat_the_class_mean():
    said = STUDY.conclude(QUICK, table_of((setting(decoder="class_mean_gradient"), MIDDLE), (setting(), GOOD)))
    assert said[0] == "Every decoder is above the mean gradient of the victim's class, at every number of pairs."


def test_a_difference_whose_interval_holds_zero_is_called_nothing():
    floor = (setting(decoder="class_mean_gradient", starts="one each", inputs="A and B"), BAD)
    rows = [
        (setting(starts="one each", inputs="A and B"), [0.5, 0.6, 0.55]),
        (setting(starts="one each", inputs="BA"), [0.6, 0.5, 0.55]),
        (setting(starts="one each", inputs="G P_A"), GOOD),
    ]
    (same,) = [text for text in STUDY.conclude(QUICK, table_of(floor, *rows)) if text.startswith("ridge of BA")]
    (better,) = [text for text in STUDY.conclude(QUICK, table_of(floor, *rows)) if text.startswith("ridge of G P_A")]
    assert same.endswith("which is nothing.") and "0.550 against 0.550 with inputs A and B" in same
    assert "nothing" not in better and "0.910 against 0.550" in better


@pytest.mark.parametrize(
    "rows", [(), ((setting(), GOOD),), ((setting(), [0.9]), (setting(decoder="class_mean_gradient"), [0.5]))]
)
def test_missing_rows_and_single_values_are_no_error(rows):
    said = STUDY.conclude(QUICK, table_of(*rows))
    assert not any(text.startswith("Every") for text in said)  # one value has no interval, so nothing is shown
