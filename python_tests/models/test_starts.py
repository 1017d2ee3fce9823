"""What the sentences on init_lora_weights claim, against PEFT's own layers."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from torch import nn

from r2f_ext.errors import R2FError
from r2f_ext.models.starts import REFUSED, shows_eva, start_of


def started(init, prepare=None, fields=None):
    """(base weight before, PEFT's layer) of one Linear [8, 16] under a start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    before = model[0].weight.detach().clone()
    if prepare is not None:
        prepare(model[0])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init, **(fields or {}))
    return before, get_peft_model(model, config).base_model.model[0]


def with_eigens(layer):
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    layer.eigens = SimpleNamespace(U_WC=u[:, :4], S_WC=s[:4], V_WC=v[:4].T.contiguous())


def with_gradient(layer):
    layer._peft_loraga_grad = torch.randn(8, 16)


STARTS = {
    "true": (True,),
    "gaussian": ("gaussian",),
    "eva": ("eva",),
    "false": (False,),
    "pissa": ("pissa",),
    "pissa_niter_2": ("pissa_niter_2",),
    "olora": ("olora",),
    "corda": ("corda", with_eigens, {"corda_config": CordaConfig()}),
    "lora_ga": ("lora_ga", with_gradient, {"lora_ga_config": LoraGAConfig()}),
    "orthogonal": ("orthogonal",),
    "mica": ("mica",),
}


@cache
def start(name):
    init, *rest = STARTS[name]
    return started(init, *rest)


def state(name):
    before, layer = start(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return torch.equal(layer.base_layer.weight, before), bool(a.any()), bool(b.any()), b.requires_grad


@pytest.mark.parametrize("name", ["true", "gaussian", "eva"])
def test_accepted_starts_leave_the_base_and_b_is_zero(name):
    assert state(name) == (True, True, False, True)
    assert start_of(True if name == "true" else name, "it") == name


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga"])
def test_starts_that_change_the_base_say_so(name):
    before, layer = start(name)
    assert state(name) == (False, True, True, True)
    total = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(total, before, rtol=1e-3, atol=1e-4)  # B A was taken out of the base
    with pytest.raises(R2FError, match=rf"init_lora_weights {name}; .* taken out of the base.*weight_conversion"):
        start_of(name, "it")


def test_the_other_refusals_state_what_peft_does():
    assert state("orthogonal") == (True, True, True, True)
    assert state("false") == (True, True, True, True)
    assert state("mica") == (True, False, True, False)
    sentences = {
        "loftq": "replaced by a quantised one",
        "orthogonal": "B then starts from random numbers",
        "mica": "B stays",
    }
    for name, said in sentences.items():
        with pytest.raises(R2FError, match=said):
            start_of(name, "it")
    for value in (False, None):
        with pytest.raises(R2FError, match="draws both A and B at random"):
            start_of(value, "it")
    assert all("A itself gives away" in REFUSED[name] for name in ("corda", "lora_ga"))  # made from data


@pytest.mark.parametrize("value", ["later_method", 1, 1.0, [], {"a": 1}, "true", "x" * 5000])
def test_an_unknown_start_is_refused_as_unknown(value):
    with pytest.raises(R2FError, match="a start that is not known here") as caught:
        start_of(value, "it")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("rank", "d_in", "layers"), [(2, 16, 12), (8, 64, 4), (16, 768, 1)])
def test_evas_rows_are_told_from_random_ones(rank, d_in, layers):
    """And from rows that a small training has moved."""
    names = [f"{i}.lora_A.weight" for i in range(layers)]
    eva = {name: torch.linalg.qr(torch.randn(d_in, rank))[0].T for name in names}
    moved = {name: a + 0.2 * d_in**-0.5 * torch.randn(rank, d_in) for name, a in eva.items()}
    assert shows_eva(eva) and shows_eva(moved)
    assert not shows_eva({name: torch.randn(rank, d_in) for name in names})
    assert not shows_eva({name: torch.rand(rank, d_in) - 0.5 for name in names})


def test_one_row_shows_nothing_of_eva():
    assert not shows_eva({"a.lora_A.weight": torch.randn(1, 16)}) and not shows_eva({})
