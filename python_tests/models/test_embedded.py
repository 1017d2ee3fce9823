"""The base that ships in the package."""

import torch
from safetensors.torch import load_file

from r2f_ext.data import load_images
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.models.embedded import WEIGHTS, build_embedded_vit, reset_head


def test_asset_holds_exactly_the_architecture(embedded):
    tensors = load_file(WEIGHTS)
    assert {k: v.shape for k, v in tensors.items()} == {
        k: v.shape for k, v in build_embedded_vit().state_dict().items()
    }
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert WEIGHTS.stat().st_size < 5_000_000
    assert all(torch.equal(v, tensors[k]) for k, v in embedded.model.state_dict().items())


def test_its_head_is_fresh(embedded):
    """A head that fits its task gives next to no gradient: accuracy near chance, loss near log 10."""
    images = load_images("embedded", role="private")
    with torch.no_grad():
        logits = embedded.model(embedded.normalize(images.batch(slice(None))))
    loss = torch.nn.functional.cross_entropy(logits, images.labels)
    assert 1.8 < loss < 3.5
    model = build_embedded_vit()
    reset_head(model)
    assert torch.equal(model.head.weight, embedded.model.head.weight) and not embedded.model.head.bias.any()


def test_its_trunk_is_pretrained(embedded):
    """Nearest class mean on pooled features beats a random trunk by far."""
    proxy, private = load_images("embedded", count=400), load_images("embedded", role="private")
    accuracy = {}
    torch.manual_seed(0)
    for name, model in (("shipped", embedded.model), ("random", build_embedded_vit().eval())):
        with torch.no_grad():
            known, asked = (
                model.forward_head(model.forward_features(embedded.normalize(s.batch(slice(None)))), pre_logits=True)
                for s in (proxy, private)
            )
        means = torch.stack([known[proxy.labels == label].mean(0) for label in range(10)])
        accuracy[name] = (torch.cdist(asked, means).argmin(1) == private.labels).float().mean()
    assert accuracy["shipped"] > 0.8 and accuracy["shipped"] > accuracy["random"] + 0.15


def test_both_closed_forms_count_as_exact(embedded):
    verdicts = identifiability(embedded)
    assert verdicts["patch_position"].identifiable and verdicts["attention_rowspace"].identifiable
