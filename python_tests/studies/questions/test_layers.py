import numpy as np
import pytest
import torch

from r2f_ext.studies import CLOTHES, Row, Table, World
from r2f_ext.studies.questions.layers import Layers, effective_rank, ranks_of, row_cosine, seen_layers
from r2f_ext.studies.scene import base_of, target_of
from r2f_ext.types import Gradient

WORLD = World(data=(CLOTHES,))


def row(metric, values, **keys):
    return Row(keys, metric, tuple(values), min(values), max(values))


def test_settings_cover_each_layer_and_the_blocks_from_either_side():
    target = target_of(base_of(WORLD.base, WORLD.device))
    settings = Layers().settings(WORLD)
    assert [one["layer"] for one in settings if one["scope"] == "alone"] == list(target.names)
    assert seen_layers(target, {"scope": "from input", "blocks": 1}) == list(target.names[:4])
    assert seen_layers(target, {"scope": "from output", "blocks": 3}) == list(target.names[4:])
    assert seen_layers(target, {"scope": "from input", "blocks": 4}) == list(target.names)


def test_the_row_cosine_compares_leading_right_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 3, 6, 5, generator=generator)
    found = row_cosine(Gradient({"a": one}), Gradient({"a": two}))
    for victim in range(3):
        left, right = (np.linalg.svd(each[victim].double().numpy())[2][0] for each in (one, two))
        assert float(found[victim]) == pytest.approx(abs(left @ right), abs=1e-6)


def test_ranks_of_matrices_whose_ranks_are_known():
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(12, 3, generator=generator)).Q
    product = orthogonal @ torch.linalg.qr(torch.randn(9, 3, generator=generator)).Q.mT
    assert float(effective_rank(product[None])) == pytest.approx(3, abs=1e-3)
    assert float(effective_rank(product[None, :, :1])) == pytest.approx(1, abs=1e-6)
    found = {(one.metric, one.labels["of"]): one.values for one in ranks_of(product[None, :, :2], product[None])}
    assert found["rank", "update"] == [2]
    assert found["rank", "gradient"] == [3]


def test_conclusions_follow_the_table():
    def of(one, two):
        rows = []
        for layer, values in (("blocks.0.attn.qkv", one), ("blocks.3.mlp.fc2", two)):
            keys = {"scope": "alone", "layer": layer}
            rows += [
                row("psnr_db", values, **keys, route="amortised"),
                row("psnr_db", [15.0, 16.0], **keys, route="stranger"),
                row("rank", [29.0, 31.0], **keys, of="gradient"),
                row("rank", [8.0, 8.0], **keys, of="update"),
            ]
        return Table(rows)

    said = Layers().conclude(WORLD, of([20.0, 21.0], [15.0, 16.0]))
    assert "1 of 2 (blocks.3.mlp.fc2)" in said[0]
    assert "Alone, blocks.0.attn.qkv gives most" in said[1]
    assert "in 2 of 2 layers; it is 30.0 to 30.0" in said[-1]
    assert "0 of 2 (none)" in Layers().conclude(WORLD, of([20.0, 21.0], [25.0, 26.0]))[0]
    assert Layers().conclude(WORLD, Table([])) == []
    sides = [
        row("psnr_db", [v], scope=s, blocks=1, route="amortised")
        for s, v in (("from input", 19.0), ("from output", 17.0))
    ]
    (said,) = Layers().conclude(WORLD, Table(sides))
    assert said.startswith("By the amortised route the first block gives 19.0") and "the difference is 2.0 dB" in said
