"""The projection holds exactly G P_A."""

import torch
from cases import LINEAR, target_of, tiny_base

from r2f_ext.decoders import Projection
from r2f_ext.decoders.projection import projection_matrix
from r2f_ext.types import AdaptedLayer


class Start:
    """A pair source that provides only A and the target."""

    def __init__(self):
        self.target = target_of(tiny_base(torch.float32), LINEAR, rank=4, scale=2.5)
        self.a = {layer.name: torch.randn(layer.rank, layer.d_in) for layer in self.target.layers}


def test_decodes_to_the_projection_on_the_rows_of_a():
    start, decoder = Start(), Projection()
    decoder.start(start, 0)
    gradients = {layer.name: torch.randn(3, layer.d_out, layer.d_in) for layer in start.target.layers}
    decoded = decoder.decode({name: 2.5 * g @ start.a[name].mT for name, g in gradients.items()})
    for name, gradient in gradients.items():
        basis, _ = torch.linalg.qr(start.a[name].mT.double())  # P_A from an orthonormal basis of A's rows
        expected = (gradient.double() @ basis @ basis.mT).float()
        torch.testing.assert_close(decoded.dense[name], expected, rtol=1e-4, atol=1e-5)


def test_a_of_deficient_rank():
    a = torch.randn(1, 9).double().expand(3, 9)
    gradient = torch.randn(5, 9).double()
    decoded = (gradient @ a.mT) @ projection_matrix(AdaptedLayer("x", 5, 9, 3, 1.0), a)
    unit = a[0] / a[0].norm()
    torch.testing.assert_close(decoded, (gradient @ unit)[:, None] * unit)
