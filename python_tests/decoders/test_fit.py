"""Several kinds in one pass over the pairs."""

import torch

from r2f_ext.decoders import KINDS, fit_decoders

FIT = 120


def test_one_pass_fits_the_same_as_three(pairs):
    (batch,) = pairs.batches(FIT, FIT + 5)
    for together in fit_decoders(pairs, 60):
        alone = KINDS[together.kind]()
        alone.fit(pairs, 60)
        for name, gradient in alone.decode(batch.updates).dense.items():
            torch.testing.assert_close(together.decode(batch.updates).dense[name], gradient)
