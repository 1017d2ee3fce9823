"""A problem for the routes that estimate images label by label."""

from dataclasses import replace

import pytest
import torch
from cases import peft_start, proxy_set, tiny_base

from r2f_ext.decoders import stack_updates
from r2f_ext.inversion.route import Problem, Public, adapter_problem
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.types import LoraUpdate, Reconstruction

LABELS = torch.tensor([3, 1, 3])


@pytest.fixture
def labelled() -> Problem:
    """Three one-step victims whose labels a route has found, and 900 public images."""
    base = tiny_base(torch.float32)
    target, a = peft_start(base, target_modules=["attn.qkv", "mlp.fc2"])
    private = replace(proxy_set(3, base), labels=LABELS)
    (batch,) = GeneratedPairs(target, a, private).batches()
    adapters = [LoraUpdate(a, {name: -each[victim] for name, each in batch.updates.items()}) for victim in range(3)]
    posed = adapter_problem(target, adapters)
    found = Reconstruction("amortised", batch.images[:, 0], LABELS, "", 0.0, {"pairs_a_victim": 10.0})
    public = Public(replace(proxy_set(900, base), labels=torch.arange(900) % 5))
    return replace(posed, observed=stack_updates(adapters), a=a, found={"amortised": found}, public=public)
