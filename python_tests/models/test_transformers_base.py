"""Bases of transformers: the same logits and gradients as transformers' own, and one sentence for what is missing."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from cases import target_of
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel
from transformers_cases import CLASSES, FAMILIES, PATCHES, SIZES, classifier, dinov3, moved

from r2f_ext.capture import Capture, hooks
from r2f_ext.capture.tangents import CaptureTangents
from r2f_ext.errors import R2FError
from r2f_ext.models import load_base
from r2f_ext.models.base import check_classifier
from r2f_ext.models.transformers_base import current_names


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> (folder as save_pretrained writes it, the model)."""
    found = {}
    for family in FAMILIES:
        model, folder = classifier(family), tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        found[family] = folder, model
    return found


def layers_of(base, family):
    """q, v and the patch embedding of every block."""
    ends = ("q_proj", "v_proj", PATCHES.get(family, "patch_embeddings.projection"))
    return tuple(name for name, _ in base.model.named_modules() if name.endswith(ends))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, folders):
    folder, model = folders[family]
    base, inputs = load_base(str(folder)), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(base.model(inputs), model(pixel_values=inputs).logits, rtol=1e-4, atol=1e-5)
    assert (base.input_shape, base.num_classes, base.spec) == ((3, 16, 16), CLASSES, str(folder))
    assert not any(module.training for module in base.model.modules())
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in base.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_fused_in_a_context_and_gives_the_same(family, folders, device):
    base, seen = load_base(str(folders[family][0]), device=device), []
    attention = [module for module in base.model.modules() if hooks._switch_of(module) is not None]
    config, inputs = attention[0].config, torch.randn(3, 3, 16, 16, device=device)
    with attention[0].register_forward_hook(lambda *_: seen.append(config._attn_implementation)), torch.no_grad():
        with hooks.fused_attention(base.model, True):
            fused = base.model(inputs)
        plain = base.model(inputs)
    assert len(attention) == 2 and seen == ["sdpa", "eager"] and config._attn_implementation == "eager"
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_gradients_are_those_of_transformers_own_loss(family, folders):
    folder, model = folders[family]
    base = load_base(str(folder))
    target = target_of(base, layers_of(base, family))
    assert len(target.layers) == 5
    images, labels = torch.rand(2, 3, 3, 16, 16), torch.randint(0, CLASSES, (2, 3))
    with Capture(target) as capture:
        found = capture(images, labels)
    own = copy.deepcopy(model).requires_grad_(True)
    for p in range(2):
        own.zero_grad()
        own(pixel_values=base.normalize(images[p]), labels=labels[p]).loss.backward()
        for layer in target.layers:
            true = own.get_parameter(f"{layer.name}.weight").grad.flatten(1)
            torch.testing.assert_close(found.dense(layer.name)[p], true, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives_through_the_backward(family, folders):
    """By double backward, and by forward over reverse mode, against central differences.

    transformers' eager softmax rounds to float32 whatever the model's dtype, so differences need a large step.
    """
    base = load_base(str(folders[family][0]))
    base.model.double()
    target = target_of(base, layers_of(base, family))
    image, label = torch.rand(1, 3, 16, 16).double(), torch.tensor([2])
    direction = torch.randn(1, 3, 16, 16).double()
    step = 1e-3

    def weights(pixels, create_graph=False):
        with Capture(target) as capture:
            found = capture(pixels[None], label[None], create_graph=create_graph)
        return {name: found.dense(name)[0] for name in target.names}

    ahead, behind = weights(image + step * direction), weights(image - step * direction)
    slopes = {name: (ahead[name] - behind[name]) / (2 * step) for name in target.names}
    tangents = CaptureTangents(target)
    found, moved = tangents._along(image, label, direction[None])  # not traced, which takes long on two cores
    for name in target.names:
        along = product(found[0][name], moved[1][name][0]) + product(moved[0][name][0], found[1][name])
        assert (along - slopes[name]).norm() < 1e-3 * slopes[name].norm()
    free = image.clone().requires_grad_()
    loss = sum(value.square().sum() for value in weights(free, create_graph=True).values())
    (slope,) = torch.autograd.grad(loss, free)
    here = weights(image)
    expected = sum(2 * (here[name] * slopes[name]).sum() for name in target.names)
    torch.testing.assert_close((slope * direction).sum(), expected, rtol=1e-3, atol=1e-8)


def product(x, delta):
    """delta^T x of one group, [d_out, d_in]."""
    return (delta.mT @ x)[0]


@pytest.mark.slow  # traced on two cores
def test_tracing_changes_no_tangent(folders):
    base = load_base(str(folders["vit"][0]))
    target = target_of(base, layers_of(base, "vit")[-1:])
    inputs = torch.rand(1, 3, 16, 16), torch.tensor([2]), torch.randn(2, 1, 3, 16, 16)
    tangents = CaptureTangents(target)
    for traced, plain in zip(tangents(*inputs), tangents._along(*inputs), strict=True):
        for name in target.names:
            torch.testing.assert_close(traced.x[name], plain[0][name], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(traced.delta[name], plain[1][name], rtol=1e-4, atol=1e-7)


def test_sharded_files_and_half_precision(tmp_path):
    model = classifier("vit")
    model.half().save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (tmp_path / "model.safetensors").exists()
    base = load_base(str(tmp_path))
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float())


def test_a_base_without_a_classifier(tmp_path):
    torch.manual_seed(0)
    moved(ViTModel(ViTConfig(**SIZES))).save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.num_classes == 0
    assert load_base(str(tmp_path), num_classes=4).model(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    with pytest.raises(R2FError, match=r"has no classifier.*modules_to_save"):
        check_classifier(base)


def test_the_head_is_made_anew_for_an_adapter_that_brings_its_own(folders):
    base = load_base(str(folders["vit"][0]), num_classes=7)
    assert base.num_classes == 7 and base.model.classifier.weight.shape == (7, 24)
    assert base.model(torch.rand(2, 3, 16, 16)).shape == (2, 7)


def test_dinov3_has_features_and_no_classifier(tmp_path):
    model = dinov3()
    model.save_pretrained(tmp_path)
    base, inputs = load_base(str(tmp_path)), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(base.model(inputs), model(inputs).pooler_output, rtol=1e-4, atol=1e-5)
    assert base.num_classes == 0 and base.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("processor", "mean", "std", "notes"),
    [
        (None, (0.5,) * 3, (0.5,) * 3, "has no preprocessor_config.json: pixel mean"),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 0.5, 0.25]}, (0.1, 0.2, 0.3), (1.0, 0.5, 0.25), None),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3, None),
        ({"image_mean": 0.5, "image_std": 0.5, "rescale_factor": 1 / 127.5}, (0.25,) * 3, (0.25,) * 3, None),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 16}, (0.5,) * 3, (0.5,) * 3, None),
        (
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}},
            (0.5,) * 3,
            (0.5,) * 3,
            "makes images of 32x32, which the model does not read: 16x16",
        ),
    ],
)
def test_pixel_statistics_and_size_of_the_image_processor(processor, mean, std, notes, tmp_path):
    classifier("vit").save_pretrained(tmp_path)
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    base = load_base(str(tmp_path))
    assert base.mean == pytest.approx(mean) and base.std == pytest.approx(std) and base.input_shape == (3, 16, 16)
    assert notes in base.notes[0] if notes else base.notes == ()


def test_the_image_processor_decides_where_the_model_reads_its_size(tmp_path):
    classifier("dinov2", image_size=24).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size | statistics))
    assert load_base(str(tmp_path)).input_shape == (3, 16, 16)  # DINOv2 resamples its positions


def test_no_code_of_the_folder_runs(tmp_path):
    classifier("vit").save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: ...\n")
    config = json.loads((tmp_path / "config.json").read_text())
    known = config | {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageClassification": "mine.Mine"}}
    for changed in (known, known | {"model_type": "mine"}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            load_base(str(tmp_path))
        except R2FError as error:
            assert "installed transformers knows" in str(error)
        assert not ran.exists()


def broken(folder, what):
    path = folder / "model.safetensors"
    if what == "pickle":
        path.rename(folder / "pytorch_model.bin")
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif what == "lacks":
        save_file({k: v for k, v in load_file(path).items() if "layernorm.weight" not in k}, path, {"format": "pt"})
    elif what == "shape":
        (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"hidden_size": 24', '"hidden_size": 32')
        )
    elif what == "processor":
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5]}')
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": what}))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("pickle", r"holds pytorch_model.bin, a pickle, which is never opened: .*save_pretrained"),
        ("truncated", "cannot be loaded"),
        ("lacks", r"lack vit.layernorm.weight"),
        ("shape", "hold another shape of"),
        ("processor", "preprocessor_config.json is damaged"),
        ("no-such-type", "installed transformers knows"),
        (5, "installed transformers knows"),
    ],
)
def test_broken_folders_are_one_sentence(what, words, tmp_path):
    classifier("vit").save_pretrained(tmp_path)
    broken(tmp_path, what)
    with pytest.raises(R2FError, match=words) as caught:
        load_base(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_multi_label_base_says_that_its_loss_is_another(tmp_path):
    classifier("vit", problem_type="multi_label_classification").save_pretrained(tmp_path)
    assert any("problem_type=multi_label_classification" in note for note in load_base(str(tmp_path)).notes)


def test_names_of_older_transformers(folders):
    old = {
        "vit.encoder.layer.0.attention.attention.query": "vit.layers.0.attention.q_proj",
        "vit.encoder.layer.1.attention.output.dense": "vit.layers.1.attention.o_proj",
        "vit.encoder.layer.1.intermediate.dense": "vit.layers.1.mlp.fc1",
        "vit.encoder.layer.1.output.dense": "vit.layers.1.mlp.fc2",
    }
    base = load_base(str(folders["vit"][0]))
    assert current_names([*old, "vit.layers.0.attention.q_proj", "nonsense"], base.model) == old
    dinov2 = load_base(str(folders["dinov2"][0]))
    name = next(name for name, _ in dinov2.model.named_modules() if name.endswith("0.attention.q_proj"))
    assert current_names([name.replace("q_proj", "attention.query")], dinov2.model) == {
        name.replace("q_proj", "attention.query"): name
    }


def test_loss_of_several_classes_is_plain_cross_entropy(folders):
    """What the audit assumes of transformers' own loss."""
    folder, model = folders["vit"]
    base, inputs, labels = load_base(str(folder)), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 4])
    with torch.no_grad():
        torch.testing.assert_close(
            F.cross_entropy(base.model(inputs), labels), copy.deepcopy(model)(inputs, labels=labels).loss
        )
