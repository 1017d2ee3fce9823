"""Controls by hand."""

import torch

from r2f_ext.audit.controls import make_controls
from r2f_ext.data import ImageSet


def test_controls_by_hand():
    levels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)
    proxy = ImageSet("p", levels.view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous(), torch.tensor([0, 0, 1, 1]))
    labels = torch.tensor([1, 0, 7])
    guess = torch.tensor([0.35, 0.9, 0.05]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    shuffled = torch.rand(3, 1, 2, 2)
    controls = make_controls(proxy, labels, guess, shuffled)

    def level(images):
        assert images.shape == (3, 1, 2, 2)
        assert torch.equal(images, images[:, :, :1, :1].expand_as(images))
        return [round(value, 4) for value in images[:, 0, 0, 0].tolist()]

    assert level(controls.mean_image) == [0.4, 0.4, 0.4]
    assert level(controls.class_mean) == [0.7, 0.1, 0.4]  # class 7 is not in the proxy: the mean image
    assert level(controls.nearest_proxy) == [0.4, 1.0, 0.0]
    assert torch.equal(controls.shuffled_adapter, shuffled)
    assert list(controls.items()) == ["mean_image", "class_mean", "nearest_proxy", "shuffled_adapter"]
