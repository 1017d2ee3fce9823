import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from vit_cases import psnr, small_vit, smooth_images

from r2f_ext.errors import R2FError
from r2f_ext.inversion.adapter_rowspace import invert_adapter_rowspace, remaining_share
from r2f_ext.inversion.exactness import exactness_of
from r2f_ext.inversion.geometry import FIRST_QKV
from r2f_ext.inversion.reconstruction import stack_victims
from r2f_ext.types import AdaptedLayer, LoraUpdate, Target


@functools.cache
def _victim(
    rank: int, steps: int, dtype: torch.dtype = torch.float64, lr: float = 0.05, weight_decay: float = 0.0
) -> tuple[torch.Tensor, Target, LoraUpdate]:
    """SGD on one image from PEFT's default start."""
    base, image = small_vit(dtype), smooth_images(1, 16)
    target = Target(base, (AdaptedLayer(FIRST_QKV, 288, 96, rank, 2.0),))
    start = (torch.rand(rank, 96, generator=torch.Generator().manual_seed(1), dtype=dtype) - 0.5) / 5
    a, b = start.clone().requires_grad_(), torch.zeros(288, rank, dtype=dtype, requires_grad=True)
    qkv = base.model.blocks[0].attn.qkv
    handle = qkv.register_forward_hook(lambda _, args, out: out + 2.0 * args[0] @ a.T @ b.T)
    optimizer = torch.optim.SGD([a, b], lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(base.model(base.normalize(image.to(dtype))), torch.tensor([3])).backward()
        optimizer.step()
    handle.remove()
    update = LoraUpdate({FIRST_QKV: a.detach()}, {FIRST_QKV: b.detach()}, {FIRST_QKV: start})
    return image, target, update


@pytest.mark.parametrize(("rank", "steps"), [(16, 5), (32, 2), (32, 5)])
def test_movement_of_a_gives_the_image_in_float64(rank: int, steps: int) -> None:
    image, target, update = _victim(rank, steps)
    found = invert_adapter_rowspace(target, update)
    assert found.route == "adapter_rowspace"
    assert psnr(found.images, image) >= 50


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 80), (torch.float32, 40)])
def test_one_step_gives_the_image_through_b_where_the_rank_is_large(dtype: torch.dtype, floor: float) -> None:
    image, target, update = _victim(80, 1, dtype)
    assert torch.equal(update.a[FIRST_QKV], update.a0[FIRST_QKV])
    assert psnr(invert_adapter_rowspace(target, update).images, image) >= floor


def test_one_step_with_weight_decay_is_seen_as_one_step() -> None:
    image, target, update = _victim(80, 1, weight_decay=0.1)
    assert update.a0 is not None and not torch.equal(update.a[FIRST_QKV], update.a0[FIRST_QKV])
    assert psnr(invert_adapter_rowspace(target, update).images, image) >= 80


@pytest.mark.parametrize(("steps", "decay"), [(2, 0.1), (5, 0.01), (50, 0.1)])
def test_weight_decay_is_seen_and_taken_out(steps: int, decay: float) -> None:
    image, target, update = _victim(32, steps, weight_decay=decay)
    assert update.a0 is not None
    share = remaining_share(update.a[FIRST_QKV], update.a0[FIRST_QKV], tokens=17)
    assert share == pytest.approx((1 - 0.05 * decay) ** steps, rel=1e-9)
    assert psnr(invert_adapter_rowspace(target, update).images, image) >= 50


def test_without_weight_decay_or_spare_ranks_no_share_is_taken() -> None:
    for rank in (16, 32):
        _, _, update = _victim(rank, 5)
        assert update.a0 is not None
        assert remaining_share(update.a[FIRST_QKV], update.a0[FIRST_QKV], tokens=17) == pytest.approx(1, abs=1e-12)


def test_weight_decay_leaves_the_span_of_the_inputs_and_little_of_it() -> None:
    """At a stationary point decay * A = -scale * B^T D^T X: A lies in the inputs' span, with few directions left."""
    image, target, trained = _victim(32, 700, lr=0.5, weight_decay=0.03)
    update = dataclasses.replace(trained, a0=None)
    inputs: list[torch.Tensor] = []
    qkv = target.base.model.blocks[0].attn.qkv
    handle = qkv.register_forward_hook(lambda _, args, out: inputs.append(args[0][0]))
    target.base.model(target.base.normalize(image.double()))
    handle.remove()
    span = torch.linalg.qr(inputs[0].T).Q  # [96, 17]
    a = update.a[FIRST_QKV]
    assert (a - a @ span @ span.T).norm() < 1e-3 * a.norm()
    singular = torch.linalg.svdvals(a)
    assert (singular > 1e-2 * singular[0]).sum() < 5
    found = invert_adapter_rowspace(target, update)
    assert "of which weight decay has left" in found.why and found.details["rank"] < 16
    assert found.details["expected_psnr_db"] < 25  # a hint, and said to be one


def test_storage_precision_decides() -> None:
    image, target, update = _victim(32, 5)
    stored = LoraUpdate(*({n: t.float() for n, t in part.items()} for part in (update.a, update.b, update.a0)))
    halved = LoraUpdate(*({n: t.half().float() for n, t in part.items()} for part in (update.a, update.b, update.a0)))
    found = [invert_adapter_rowspace(target, one) for one in (update, stored, halved)]
    quality = [psnr(one.images, image) for one in found]
    assert quality[0] > quality[1] + 20 and quality[1] > quality[2]
    assert found[0].details["expected_error"] < found[1].details["expected_error"] < found[2].details["expected_error"]


@pytest.mark.parametrize(("rank", "steps", "message"), [(8, 2, "rank 8 cannot hold"), (32, 1, "A has not moved")])
def test_refused_by_count(rank: int, steps: int, message: str) -> None:
    _, target, update = _victim(rank, steps)
    with pytest.raises(R2FError, match=message):
        invert_adapter_rowspace(target, update)


def test_unknown_start_missing_layer_and_damage_are_refused() -> None:
    _, target, update = _victim(32, 2)
    with pytest.raises(R2FError, match="a0"):
        invert_adapter_rowspace(target, dataclasses.replace(update, a0=None))
    with pytest.raises(R2FError, match="no adapter on"):
        invert_adapter_rowspace(Target(target.base, ()), LoraUpdate({}, {}, {}))
    for bad in ("nan", "inf"):
        broken = {FIRST_QKV: update.a[FIRST_QKV] * float(bad)}
        with pytest.raises(R2FError, match="NaN"):
            invert_adapter_rowspace(target, dataclasses.replace(update, a=broken))


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6, 1e-3, 1e-1])
def test_a_closed_form_of_a_disturbed_adapter_claims_no_more_than_is_true(size: float) -> None:
    image, target, update = _victim(32, 5)
    movement = update.a[FIRST_QKV] - update.a0[FIRST_QKV]
    noise = size * movement.square().mean().sqrt() * torch.randn(movement.shape, dtype=torch.float64)
    disturbed = dataclasses.replace(update, a={FIRST_QKV: update.a[FIRST_QKV] + noise})
    found = stack_victims([invert_adapter_rowspace(target, disturbed)])
    said = exactness_of(found, 0)
    assert said.exact == (said.bound_db is not None) and (size < 1e-3 or not said.exact)
    assert said.bound_db is None or psnr(found.images, image) >= said.bound_db
    assert size > 0 or said.exact
    assert not exactness_of(stack_victims([invert_adapter_rowspace(target, update)], doubt="of dropout"), 0).exact
