"""The inputs of the MLP."""

import pytest
import torch

from r2f_ext.decoders import MLP
from r2f_ext.decoders.mlp import _root
from r2f_ext.errors import R2FError


def test_b_root_has_the_inner_products_of_the_product():
    a, b, other = torch.randn(3, 11), torch.randn(6, 3), torch.randn(6, 3)
    root = _root(a)
    torch.testing.assert_close(((b @ root) * (other @ root)).sum(), ((b @ a) * (other @ a)).sum(), rtol=1e-4, atol=1e-4)


def test_inputs_b_and_ba(pairs):
    (batch,) = pairs.batches(0, 2)
    name = pairs.target.names[0]
    read = {}
    for inputs in ("b", "ba"):
        decoder = MLP(inputs=inputs)
        decoder.start(pairs, 10)
        read[inputs] = decoder.read(batch.updates)[name]
        assert read[inputs].shape == (2, 384 * 8 + 512)
        inputs = decoder.read(batch.updates)
        found = decoder.predict(inputs)[name]
        assert found.shape == (2, 48 * 48)
        torch.testing.assert_close(found, decoder.networks[name](inputs[name]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(read["b"], read["ba"])
    with pytest.raises(R2FError, match="unknown inputs 'a'"):
        MLP(inputs="a")
