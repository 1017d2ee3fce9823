"""What the factors show of the training."""

import torch
from cases import peft_model, samples, save, tiny_base, train

from r2f_ext.models import attach, forgot_start, read_adapter, untouched_a


def test_untouched_a_after_one_step_and_not_after_many(tmp_path):
    base = tiny_base(torch.float32)
    images, labels = samples(1, base, torch.float32)
    found = []
    for steps, lr in ((1, 0.1), (30, 3.0)):
        model = peft_model(base)
        train(model, base, images, labels, lr=lr, steps=steps)
        found.append(untouched_a(attach(read_adapter(save(model, tmp_path / str(steps))), base)[1]))
    assert found == [True, False]


def test_forgot_start_tells_decayed_factors_from_random_ones():
    generator = torch.Generator().manual_seed(0)
    for rank, d_in in ((1, 16), (8, 96), (64, 128), (96, 96)):
        a = torch.rand(rank, d_in, generator=generator) - 0.5
        assert not forgot_start(a)
    decayed = 1e-4 * torch.rand(8, 96, generator=generator) + torch.randn(8, 1, generator=generator)
    assert forgot_start(decayed)
    assert not forgot_start(torch.full((8, 96), float("nan")))
