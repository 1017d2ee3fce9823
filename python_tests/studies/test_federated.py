import pytest
import torch

from r2f_ext.pairs import simulate
from r2f_ext.studies import CLOTHES
from r2f_ext.studies.federated import RATE, Defence, _correct, federated_accuracy
from r2f_ext.studies.groups import group_mean
from r2f_ext.studies.questions.batch import single_updates
from r2f_ext.studies.scene import base_of, start_of, target_of
from r2f_ext.studies.strangers import public_parts

CPU = torch.device("cpu")


def changes():
    generator = torch.Generator().manual_seed(0)
    return {"A": torch.randn(3, 4, 5, generator=generator), "B": torch.randn(3, 6, 4, generator=generator)}


def norms(change):
    return torch.cat([each.flatten(1) for each in change.values()], 1).norm(dim=1)


def test_clipping_scales_down_what_is_above_the_bound_and_nothing_else():
    change = changes()
    change = {name: each * torch.tensor([0.01, 1.0, 10.0])[:, None, None] for name, each in change.items()}
    sent = Defence(clip=True)(change, 1.0, torch.Generator())
    torch.testing.assert_close(norms(sent), norms(change).clamp_max(1.0))
    for name, each in change.items():
        cosine = torch.nn.functional.cosine_similarity(sent[name].flatten(1), each.flatten(1))
        torch.testing.assert_close(cosine, torch.ones(3))


def test_noise_is_a_share_of_the_bound_on_every_entry():
    change = {"B": torch.zeros(2, 200, 200)}
    sent = Defence(clip=True, noise=0.1)(change, 5.0, torch.Generator().manual_seed(0))
    assert float(sent["B"].std()) == pytest.approx(0.5, rel=0.02)


def test_rounding():
    change = changes()
    for name in ("float16", "bfloat16"):
        sent = Defence(rounding=name)(change, 1.0, torch.Generator())
        torch.testing.assert_close(sent["A"], change["A"].to(getattr(torch, name)).float(), rtol=0, atol=0)
    signs = Defence(rounding="sign")(change, 1.0, torch.Generator())["B"]
    assert torch.equal(signs.sign(), change["B"].sign())
    torch.testing.assert_close(signs.abs()[1], change["B"][1].abs().mean().expand(6, 4))


def test_fewer_blocks_are_those_nearest_the_output():
    base = base_of("embedded", CPU)
    assert {name.split(".")[1] for name in Defence(blocks=0.5).target(base).names} == {"2", "3"}
    assert {name.split(".")[1] for name in Defence(blocks=0.0).target(base).names} == {"3"}
    assert Defence().target(base).layers == target_of(base).layers
    assert Defence(rank=2).target(base).layers[0].scale == pytest.approx(4.0)


def test_a_round_of_one_step_averages_the_clients_and_batches_change_nothing():
    base = base_of("embedded", CPU)
    train, test = public_parts(base, CLOTHES, 0, (8, 60))
    target = Defence().target(base)
    a = start_of(target, 3)
    mean = group_mean(single_updates(target, a, train), torch.arange(8)[None])
    b = {layer.name: -RATE * mean[layer.name].view(layer.d_out, layer.rank) for layer in target.layers}
    wanted = _correct(target, a, b, test)
    for batch in (1, 4):
        found = federated_accuracy(base, Defence(batch=batch), train, test, 8, 1.0, 3)
        assert torch.equal(found, wanted)


def test_the_merged_model_is_the_adapted_one():
    base = base_of("embedded", CPU)
    train, test = public_parts(base, CLOTHES, 0, (20, 100))
    target, defence = Defence().target(base), Defence(steps=3, batch=20)
    a = start_of(target, 0)
    trained = simulate(target, a, train.batch(slice(None))[None], train.labels[None], defence.training)
    right = federated_accuracy(base, defence, train, test, 20, 1.0, 0)
    wanted = _correct(target, {n: x[0] for n, x in trained.a.items()}, {n: x[0] for n, x in trained.b.items()}, test)
    assert torch.equal(right, wanted)
