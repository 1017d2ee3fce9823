"""The kernel on updates against its definition, written out per layer."""

import torch

from r2f_ext.decoders.kernel import GAMMA, block_of, half_gaussian_, kernels

LAYERS = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc2")


def test_the_block_of_a_layer_is_its_path_up_to_the_first_number():
    assert [block_of(name) for name in LAYERS] == ["patch_embed.proj", "blocks.0", "blocks.0", "blocks.1"]
    assert block_of("layers.3.blocks.1.attn") == "layers.3"


def test_a_layers_kernel_mixes_its_own_products_with_those_of_its_block_and_of_all_layers():
    products = {name: torch.rand(5, 7).double() for name in LAYERS}
    own = dict(zip(LAYERS, (0.2, 0.5, 0.7, 0.9), strict=True))
    blocks = {name: [other for other in LAYERS if block_of(other) == block_of(name)] for name in LAYERS}
    everything = torch.stack(list(products.values())).mean(0)
    for wanted in (LAYERS, LAYERS[2:]):
        found = dict(kernels(products, wanted, own.__getitem__))
        assert found.keys() == set(wanted)
        for name, kernel in found.items():
            block = torch.stack([products[other] for other in blocks[name]]).mean(0)
            c = own[name] * products[name] + (1 - own[name]) / 2 * (block + everything)
            torch.testing.assert_close(kernel, (c + torch.exp(2 * GAMMA * (c - 1))) / 2)
    assert not dict(kernels(products, (), own.__getitem__))


def test_the_kernel_of_equal_updates_is_one():
    assert torch.equal(half_gaussian_(torch.ones(2, 3)), torch.ones(2, 3))
