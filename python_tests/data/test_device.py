"""Copies to a device."""

import torch

from r2f_ext.data import to_device


def test_it_is_a_copy_on_the_device(device):
    tensor = torch.arange(12).view(3, 4)
    found = to_device(tensor, device)
    assert found.device.type == device.type and torch.equal(found.cpu(), tensor)
    assert to_device(found, device) is found
