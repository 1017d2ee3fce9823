"""Counts of independent numbers: against ranks of what a model really gives."""

import pytest
import torch
from cases import samples, target_of, tiny_base
from vit_cases import small_vit

from r2f_ext.capture import Capture
from r2f_ext.inversion.counting import rank_limited
from r2f_ext.inversion.geometry import structural_tokens
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.inversion.route import Problem
from r2f_ext.inversion.routes import registry
from r2f_ext.models import shape_of

BEHIND = tuple(f"blocks.1.{layer}" for layer in ("attn.proj", "mlp.fc1", "mlp.fc2"))
NAMES = ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.qkv", *BEHIND)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 9, 4), (3, 9, 4), (7, 9, 4), (2, 3, 11)])
def test_the_count_is_the_dimension_of_the_sums_of_outer_products(tokens, rows, columns):
    """It is the rank of the derivative of delta^T x at random delta [tokens, rows] and x [tokens, columns]."""
    delta, x = torch.randn(tokens, rows, dtype=torch.float64), torch.randn(tokens, columns, dtype=torch.float64)
    parts = torch.autograd.functional.jacobian(lambda d, v: (d.T @ v).flatten(), (delta, x))
    jacobian = torch.cat([part.reshape(rows * columns, -1) for part in parts], dim=1)
    assert rank_limited(tokens, rows, columns) == int(torch.linalg.matrix_rank(jacobian))


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_measured_and_structural_tokens_are_those_of_the_gradients(pooling):
    base = tiny_base()
    base.model.global_pool = pooling
    target = target_of(base, NAMES)
    images, labels = samples(1, base)
    with Capture(target) as capture:
        delta = capture(images[None], labels[None]).delta
    true = {name: int((each[0].abs().amax(1) > 0).sum()) for name, each in delta.items()}
    assert Problem(base, target).effective_tokens == true
    if pooling == "token":
        assert structural_tokens(base, NAMES) == true and {true[name] for name in BEHIND} == {1}


def test_behind_the_last_attention_a_rank_gives_no_more_numbers():
    """r * d_out would say that 8 * (24 + 96 + 24) numbers suffice for 768 pixel values."""
    base = tiny_base()
    verdict = identifiability(base, adapter=target_of(base, BEHIND, rank=8))["gauss_newton"]
    assert verdict.equations == sum(d_out + 8 - 1 for d_out in (24, 96, 24))
    assert not verdict.identifiable and "too few for 768" in verdict.why
    wide = identifiability(base, adapter=target_of(base, BEHIND[2:], rank=24))["gauss_newton"]
    assert wide.equations == 24 + 24 - 1
    everything = identifiability(base, adapter=target_of(base, NAMES, rank=8))["gauss_newton"]
    assert everything.equations == 8 * (72 + 24 + 72) + sum(d_out + 8 - 1 for d_out in (24, 96, 24))


def test_exact_gradients_of_single_tokens_are_counted_as_such():
    base = small_vit()
    only = identifiability(base, shared=["blocks.1.mlp.fc2.weight", "pos_embed"])["matching"]
    assert only.equations == 96 + 384 - 1 + base.model.pos_embed.numel()


def test_a_base_without_weights_is_counted_by_its_structure():
    base = shape_of("vit_tiny_patch16_224")
    target = target_of(base, ("blocks.11.mlp.fc2", "blocks.0.mlp.fc2"), rank=8)
    assert Problem(base, target).effective_tokens == {"blocks.11.mlp.fc2": 1, "blocks.0.mlp.fc2": 197}


@pytest.mark.parametrize("route", ["patch_position", "attention_rowspace"])
def test_closed_forms_of_exact_gradients_are_refused_for_adapters(route):
    base = small_vit()
    verdict = registry()[route].verdict(Problem(base, target_of(base, NAMES[:1]), adapters=[]))
    assert not verdict.identifiable and verdict.why == "Not run: it needs exact gradients, and an adapter was given."
