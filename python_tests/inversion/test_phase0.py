import pytest
import timm
import torch
from vit_cases import psnr, small_vit, smooth_images

from r2f_ext.errors import R2FError
from r2f_ext.inversion.phase0 import NEEDED, exact_gradients, phase0
from r2f_ext.models.base import load_base
from r2f_ext.types import BaseModel


def test_phase0_of_the_embedded_base() -> None:
    base, images = load_base("embedded"), smooth_images(3, 32)
    outcome = phase0(base, images, torch.tensor([0, 1, 2]))
    assert [r.route for r in outcome.reconstructions] == ["attention_rowspace", "patch_position"]
    for found, floor in zip(outcome.reconstructions, (45, 80), strict=True):
        assert found.images.shape == images.shape and found.images.dtype == torch.float32
        assert psnr(found.images, images) >= floor
        assert found.seconds > 0 and found.why
        assert outcome.verdicts[found.route].identifiable


def test_refused_routes_are_left_to_the_verdicts() -> None:
    outcome = phase0(small_vit(embed_dim=64), smooth_images(2, 16), torch.tensor([0, 1]))
    assert [r.route for r in outcome.reconstructions] == ["patch_position"]
    assert not outcome.verdicts["attention_rowspace"].identifiable
    resnet = timm.create_model("resnet10t", num_classes=10).eval().requires_grad_(False)
    base = BaseModel(resnet, "resnet", (3, 32, 32), (0.5,) * 3, (0.5,) * 3, 10)
    assert phase0(base, smooth_images(1, 32), torch.tensor([0])).reconstructions == []


def test_exact_gradients_are_per_image_and_leave_the_model_frozen() -> None:
    base, images = small_vit(torch.float32), smooth_images(2, 16)
    gradients = exact_gradients(base, images, torch.tensor([0, 1]))
    assert [tuple(g) for g in gradients] == [NEEDED, NEEDED]
    alone = exact_gradients(base, images[1:], torch.tensor([1]))[0]
    for name, gradient in alone.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradients[1][name], gradient)
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


def test_state_is_restored_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    base = small_vit()
    monkeypatch.setattr(base.model, "forward", lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exact_gradients(base, smooth_images(1, 16), torch.tensor([9]))
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(R2FError, match=f"label {label} is out of range: the base has 10 classes"):
        exact_gradients(small_vit(), smooth_images(1, 16), torch.tensor([label]))


def test_works_under_no_grad() -> None:
    with torch.no_grad():
        assert len(phase0(small_vit(), smooth_images(1, 16), torch.tensor([0])).reconstructions) == 2


def test_bad_requests_are_refused() -> None:
    base = small_vit()
    with pytest.raises(R2FError, match="do not fit"):
        exact_gradients(base, smooth_images(1, 32), torch.tensor([0]))
    with pytest.raises(R2FError, match="no parameter nope"):
        exact_gradients(base, smooth_images(1, 16), torch.tensor([0]), names=["nope"])
    with pytest.raises(R2FError, match="at least one image"):
        phase0(base, smooth_images(0, 16), torch.tensor([], dtype=torch.long))
