"""Before training, a convolutional decoder equals the row-LMMSE estimate in the core's directions."""

import pytest
import torch
from torch import nn

from r2f_ext.decoders import Conv, RowLMMSE, UNet


@pytest.mark.parametrize("kind", [Conv, UNet])
def test_it_starts_from_row_lmmse(kind, pairs):
    decoder, prior = kind(), RowLMMSE()
    decoder.start(pairs, 40)
    prior.fit(pairs, 40)
    for network in decoder.networks.values():
        last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    (batch,) = pairs.batches(50, 53)
    found, expected = decoder.decode(batch.updates).dense, prior.decode(batch.updates).dense
    for name, gradient in expected.items():
        left, right = decoder.core.left[name], decoder.core.right[name]
        inside = left @ left.mT @ gradient @ right @ right.mT
        torch.testing.assert_close(found[name], inside, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", [Conv, UNet])
def test_layers_meet_in_the_context_alone(kind, pairs):
    decoder = kind()
    decoder.start(pairs, 20)
    (batch,) = pairs.batches(50, 52)
    first, *others = pairs.target.names
    changed = {**batch.updates, first: torch.randn_like(batch.updates[first])}
    before, after = decoder.decode(batch.updates).dense, decoder.decode(changed).dense
    assert not torch.allclose(before[first], after[first])
    for name in others:  # the weights of the context start at zero
        torch.testing.assert_close(before[name], after[name])
        nn.init.normal_(decoder.networks[name].context.weight)
    before, after = decoder.decode(batch.updates).dense, decoder.decode(changed).dense
    for name in others:
        assert not torch.allclose(before[name], after[name])
