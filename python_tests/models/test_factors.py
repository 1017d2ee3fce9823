"""Checks of the factors without a base: each fault's own sentence, and no fault where there is none."""

import pytest
import torch
from adapter_cases import PATHS, PREFIX, factors

from r2f_ext.errors import R2FError
from r2f_ext.models.factors import LARGEST, check_factors

LORA = {"r": 4, "lora_alpha": 8}
A0, B0, A1, B1 = (f"{PREFIX}{path}.lora_{kind}.weight" for path in PATHS for kind in "AB")


def refused(tensors, saved=None, lora=LORA) -> str:
    with pytest.raises(R2FError) as caught:
        check_factors(tensors, saved or {}, lora, "it")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(**tensors):
    return {**factors(), **{f"{PREFIX}{PATHS[0]}.lora_{kind}.weight": tensor for kind, tensor in tensors.items()}}


def test_sound_factors_pass_as_they_are():
    tensors = factors()
    found = check_factors(tensors, {}, LORA, "it")
    assert found.weights.keys() == tensors.keys() and found.dropped == () and found.notes == ()


def test_a_convolution_has_four_axes():
    tensors = changed(A=torch.randn(4, 3, 2, 2), B=torch.randn(24, 4, 1, 1))
    assert check_factors(tensors, {}, LORA, "it").notes == ()


@pytest.mark.parametrize("shape", [(0,), (0, 16), (4, 0)])
def test_empty_tensors_are_never_called_untrained(shape):
    message = refused({name: torch.zeros(shape) for name in factors()})
    assert "4 empty tensors of 4" in message and "ZeRO-3" in message and "GatheredParameters" in message
    assert "what they held is not known" in message and "zero, so" not in message and "unchanged" not in message
    assert "1 empty tensors of 4" in refused(changed(B=torch.zeros(shape)))
    assert "(head.weight)" in refused(factors(), {"head.weight": torch.zeros(shape)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_that_are_none_are_counted(value, kind):
    tensor = factors()[A0].to(kind)
    tensor[1, 2:4] = value
    assert f"NaN or infinity in {A0} (2 of 64 numbers)" in refused(changed(A=tensor))
    assert "NaN or infinity in head.bias (1 of 1 numbers)" in refused(factors(), {"head.bias": tensor[1, 2:3]})


def test_numbers_that_diverged_are_named():
    message = refused(changed(B=torch.full((24, 4), 10 * LARGEST)))
    assert "numbers up to 1e+16" in message and "smaller learning rate" in message


def test_integers_are_no_factors():
    assert "stores A of blocks.0.attn.qkv as torch.int8" in refused(changed(A=torch.ones(4, 16, dtype=torch.int8)))
    assert check_factors(factors(), {"position_ids": torch.arange(5)}, LORA, "it").notes == ()


def test_a_missing_partner_is_named():
    tensors = factors()
    del tensors[B0]
    assert "holds A of blocks.0.attn.qkv but no B" in refused(tensors)
    tensors = factors()
    del tensors[A1]
    assert "holds B of blocks.1.attn.qkv but no A" in refused(tensors)


def test_shapes_that_no_factor_has():
    assert "as a flat list of 64 numbers, as a process's shard" in refused(changed(A=torch.ones(64)))
    assert "merged linear layers of loralib" in refused(changed(B=torch.ones(16, 4, 1)))
    assert "which no factor has" in refused(changed(B=torch.ones(24, 4, 1, 1, 1)))
    assert "which no factor has" in refused(changed(A=torch.tensor(1.0)))


def test_ranks_that_disagree():
    message = refused(changed(A=torch.ones(3, 16)))
    assert "do not belong together: A of blocks.0.attn.qkv has 3 rows and B 4 columns" in message


@pytest.mark.parametrize("parts", [2, 4])
def test_slices_of_one_process(parts):
    """FSDP and DTensor shard the first axis: A [r / n, d_in], B [d_out / n, r]."""
    message = refused({name: tensor[: len(tensor) // parts] for name, tensor in factors().items()})
    assert f"holds a slice: A of blocks.0.attn.qkv has {4 // parts} rows and B 4 columns" in message
    assert f"as one of {parts} processes holds it" in message and "full state dict" in message


@pytest.mark.parametrize("half", [slice(None, 2), slice(2, None)])
def test_slices_padded_with_zeros(half):
    tensors = {}
    for name, tensor in factors().items():
        tensors[name] = torch.zeros_like(tensor)
        rows = slice(*(None if end is None else end * len(tensor) // 4 for end in (half.start, half.stop)))
        tensors[name][rows] = tensor[rows]
    assert "only 50% of the rows of A and of B are not zero" in refused(tensors)


def test_rows_of_b_that_are_zero_alone_are_no_slice():
    """A ReLU or an unused query row may leave outputs without a gradient."""
    tensors = factors()
    tensors[B0][:12] = 0
    tensors[B1][:12] = 0
    assert check_factors(tensors, {}, LORA, "it").notes == ()


def test_the_rank_of_the_configuration_is_compared():
    assert "has 4 rows, while adapter_config.json gives r = 16:" in refused(factors(), lora={"r": 16, "lora_alpha": 8})
    assert "gives r = 2:" in refused(factors(), lora={"r": 2, "lora_alpha": 8})
    check_factors(factors(), {}, {"r": 16, "lora_alpha": 8, "rank_pattern": {"qkv": 4}}, "it")
    message = refused(factors(), lora={"r": 60_000, "lora_alpha": 8, "rank_pattern": {"qkv": 4}})
    assert "gives r = 60000, while no factor has more than 4 rows" in message  # PEFT would make layers of it


def test_an_extracted_lora_is_noted():
    """A and B from the SVD of a difference of weights, balanced as the tools do it."""
    tensors = {}
    for path in PATHS:
        u, s, v = torch.linalg.svd(torch.randn(24, 16), full_matrices=False)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = s[:4].sqrt()[:, None] * v[:4]
        tensors[f"{PREFIX}{path}.lora_B.weight"] = u[:, :4] * s[:4].sqrt()
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        stored = {name: tensor.to(kind) for name, tensor in tensors.items()}
        (note,) = check_factors(stored, {}, LORA, "it").notes
        assert "as an SVD of a difference of weights makes them" in note


def test_trained_factors_are_not_called_extracted():
    """EVA's A has orthogonal rows, but B does not follow; and of rank 1 every matrix would pass."""
    eva = factors(d_in=64, d_out=96)
    for path in PATHS:
        eva[f"{PREFIX}{path}.lora_A.weight"] = torch.linalg.qr(torch.randn(64, 4))[0].T.contiguous()
    assert check_factors(eva, {}, LORA, "it").notes == ()
    assert check_factors(factors(rank=1), {}, {"r": 1}, "it").notes == ()
    for seed in range(50):
        assert check_factors(factors(rank=2, seed=seed), {}, {"r": 2}, "it").notes == ()
