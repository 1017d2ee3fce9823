"""Sketches preserve inner products in expectation."""

import torch
from cases import LINEAR, cosine, target_of, tiny_base

from r2f_ext.decoders.sketch import Sketch, mean_cosine
from r2f_ext.types import FactoredGradient


def test_cosines_of_sketches_are_those_of_the_gradients_on_average():
    target = target_of(tiny_base(), LINEAR)
    x = {layer.name: torch.randn(40, 5, layer.d_in).double() for layer in target.layers}
    delta = {layer.name: torch.randn(40, 5, layer.d_out).double() for layer in target.layers}
    near = {name: d + 0.5 * torch.randn_like(d) for name, d in delta.items()}
    true, guess = FactoredGradient(x, delta), FactoredGradient(x, near)
    for name in LINEAR:
        expected = cosine(guess.dense(name), true.dense(name)).mean()
        found = [
            mean_cosine(sketch(guess)[name], sketch(true)[name])
            for sketch in (Sketch(target, seed=s) for s in range(20))
        ]
        assert abs(torch.tensor(found).mean() - expected) < 0.02
        assert found[0] != found[1] and found[0] == mean_cosine(Sketch(target)(guess)[name], Sketch(target)(true)[name])


def test_a_layer_is_sketched_alike_whichever_others_are_there():
    base = tiny_base()
    both = Sketch(target_of(base, LINEAR)).matrices
    for name in LINEAR:
        (alone,) = Sketch(target_of(base, (name,))).matrices.values()
        assert all(torch.equal(one, other) for one, other in zip(alone, both[name], strict=True))
