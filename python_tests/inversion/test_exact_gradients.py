import pytest
import torch
from vit_cases import small_vit, smooth_images

from r2f_ext.errors import R2FError
from r2f_ext.inversion.exact_gradients import NEEDED, exact_gradients


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


def test_bad_requests_are_refused() -> None:
    base = small_vit()
    with pytest.raises(R2FError, match="do not fit"):
        exact_gradients(base, smooth_images(1, 32), torch.tensor([0]))
    with pytest.raises(R2FError, match="no parameter nope"):
        exact_gradients(base, smooth_images(1, 16), torch.tensor([0]), names=["nope"])
