"""One matrix for all rows, by least squares."""

from types import SimpleNamespace

import torch
from cases import cosine, gains_over_projection

from r2f_ext.decoders import RowLMMSE
from r2f_ext.types import FactoredGradient, PairBatch

FIT, ALL = 120, 160


def test_the_map_is_least_squares_over_all_rows_of_unit_updates(pairs):
    decoder = RowLMMSE()
    decoder.fit(pairs, 40)
    (batch,) = pairs.batches(0, 40)
    name = pairs.target.names[0]
    norms = batch.updates[name].double().flatten(1).norm(dim=1)[:, None, None]
    rows = (batch.updates[name].double() / norms).flatten(0, 1)
    wanted = (batch.gradients.dense(name).double() / norms).flatten(0, 1)
    expected = torch.linalg.lstsq(rows, wanted).solution
    assert cosine(decoder.matrices[name].flatten()[None], expected.flatten()[None]) > 0.99999
    torch.testing.assert_close(decoder.matrices[name].norm().double(), expected.norm(), rtol=1e-2, atol=0)


def test_an_exactly_linear_world_is_recovered(pairs):
    """Gradients made as G = U M for a chosen M: the fitted map is M."""
    target, a = pairs.target, pairs.a
    maps = {layer.name: torch.randn(layer.rank, layer.d_in) for layer in target.layers}

    class World:
        def __init__(self):
            self.target, self.a = target, a

        def batches(self, start=0, stop=None):
            updates = {layer.name: torch.randn(30, layer.d_out, layer.rank) for layer in target.layers}
            eye = {layer.name: torch.eye(layer.d_out).expand(30, -1, -1) for layer in target.layers}
            x = {name: u @ maps[name] for name, u in updates.items()}
            yield PairBatch(updates, FactoredGradient(x, eye), torch.zeros(30, 1, 3, 32, 32), torch.zeros(30, 1))

    decoder = RowLMMSE()
    decoder.fit(World(), 30)
    for name, expected in maps.items():
        torch.testing.assert_close(decoder.matrices[name], expected, rtol=1e-3, atol=1e-4)


def test_more_numbers_a_row_than_rows_leave_no_gap():
    """A saved layer has A = I, and a rank above d_in gives dependent columns: float32 rounding must not decide."""
    width, count = 200, 20
    x = torch.rand(count, 1, 128, generator=torch.Generator().manual_seed(0)) + 1
    d = torch.randn(count, 1, 40, generator=torch.Generator().manual_seed(1))
    a = torch.randn(128, width, generator=torch.Generator().manual_seed(2))
    layer = SimpleNamespace(name="head", rank=width, d_in=128, d_out=40)

    class World:
        target = SimpleNamespace(layers=[layer], base=SimpleNamespace(device=torch.device("cpu")))

        def batches(self, start=0, stop=None):
            gradient = FactoredGradient({"head": x}, {"head": d})
            yield PairBatch({"head": d.mT @ x @ a}, gradient, torch.zeros(count, 1, 3, 32, 32), torch.zeros(count, 1))

    decoder = RowLMMSE()
    decoder.fit(World(), count)
    seen = (d.mT @ x @ a) @ decoder.matrices["head"]
    assert cosine(seen.flatten(1), (d.mT @ x).flatten(1)).min() > 0.999


def test_it_beats_the_projection_on_held_out_pairs(pairs):
    assert min(gains_over_projection(RowLMMSE(), pairs, FIT, ALL).values()) > 0.1
