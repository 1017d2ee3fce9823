"""Random starts against PEFT's own."""

import torch
from cases import CONV, LINEAR, peft_factors, peft_model, target_of, tiny_base

from r2f_ext.pairs import random_a


def test_starts_are_drawn_as_peft_draws_them():
    base = tiny_base(torch.float32)
    names = (*LINEAR, CONV)
    target = target_of(base, names, rank=8)
    ours = random_a(target, 0, 0, 60)
    theirs = [peft_model(base, seed=seed, target_modules=list(names)) for seed in range(60)]
    for layer in target.layers:
        drawn = torch.stack([peft_factors(model, layer.name)[0] for model in theirs])
        assert ours[layer.name].shape == drawn.shape == (60, 8, layer.d_in)
        for statistic in (torch.std, torch.max, lambda t: t.abs().mean()):
            torch.testing.assert_close(statistic(ours[layer.name]), statistic(drawn), rtol=0.03, atol=0)
        assert abs(float(ours[layer.name].mean())) < 0.04 * float(drawn.max())


def test_a_victims_start_depends_on_seed_and_number_alone():
    target = target_of(tiny_base(torch.float32), LINEAR)
    whole, part, other = random_a(target, 5, 0, 10), random_a(target, 5, 4, 3), random_a(target, 6, 4, 3)
    for name in LINEAR:
        assert torch.equal(whole[name][4:7], part[name])
        assert not (part[name] == other[name]).any()
        assert len(torch.unique(whole[name][:, 0, 0])) == 10
