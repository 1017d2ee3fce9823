import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from vit_cases import small_vit

from r2f_ext.errors import R2FError
from r2f_ext.inversion.geometry import FIRST_QKV, QKV_WEIGHT
from r2f_ext.inversion.identifiability import identifiability
from r2f_ext.inversion.route import Certainty
from r2f_ext.inversion.routes import registry
from r2f_ext.models import shape_of
from r2f_ext.types import AdaptedLayer, BaseModel, Target

CLOSED_FORMS = ("patch_position", "attention_rowspace", "adapter_rowspace")


def _base(model: torch.nn.Module, size: int = 224) -> BaseModel:
    return BaseModel(model, "test", (3, size, size), (0.5,) * 3, (0.5,) * 3, 10)


def _shallow(**options) -> BaseModel:
    with torch.device("meta"):
        return _base(VisionTransformer(depth=1, num_classes=10, **options), options.get("img_size", 224))


def _adapter(base: BaseModel, rank: int, name: str = FIRST_QKV) -> Target:
    return Target(base, (AdaptedLayer(name, 288, 96, rank, 1.0),))


def test_a_resnet_is_not_a_vit_but_keeps_its_searches() -> None:
    base = _base(timm.create_model("resnet10t", num_classes=10))
    verdicts = identifiability(base)
    assert all(verdicts[route].certainty is Certainty.REFUSED for route in CLOSED_FORMS)
    assert "VisionTransformer" in verdicts["patch_position"].why


def test_every_route_of_the_registry_has_a_verdict() -> None:
    assert list(identifiability(small_vit())) == list(registry())


def test_closed_forms_are_exact_or_refused_and_searches_plausible() -> None:
    verdicts = identifiability(small_vit(), adapter=_adapter(small_vit(), 8))
    assert verdicts["patch_position"].certainty is verdicts["attention_rowspace"].certainty is Certainty.EXACT
    assert verdicts["adapter_rowspace"].certainty is Certainty.REFUSED
    assert verdicts["matching"].certainty is verdicts["gauss_newton"].certainty is Certainty.PLAUSIBLE
    assert str(Certainty.EXACT) == "exact by count"


def test_b16_is_refused_for_the_row_space_and_l14_is_not() -> None:
    b16 = identifiability(_shallow(patch_size=16, embed_dim=768, num_heads=12))
    assert b16["patch_position"].identifiable
    assert not b16["attention_rowspace"].identifiable
    assert (b16["attention_rowspace"].unknowns, b16["attention_rowspace"].equations) == (769, 571)
    assert "769" in b16["attention_rowspace"].why and "571" in b16["attention_rowspace"].why
    l14 = identifiability(_shallow(patch_size=14, embed_dim=1024, num_heads=16))
    assert (l14["attention_rowspace"].unknowns, l14["attention_rowspace"].equations) == (589, 767)
    assert l14["attention_rowspace"].identifiable and l14["patch_position"].identifiable


def test_more_patches_than_width_refuse_patch_position() -> None:
    verdict = identifiability(_shallow(img_size=32, patch_size=2, embed_dim=192, num_heads=4))["patch_position"]
    assert not verdict.identifiable and (verdict.unknowns, verdict.equations) == (256, 192)


@pytest.mark.parametrize("route", CLOSED_FORMS[:2])
def test_batches_refuse_the_closed_forms(route: str) -> None:
    assert identifiability(small_vit())[route].identifiable
    assert "2 images" in identifiability(small_vit(), batch=2)[route].why
    assert not identifiability(small_vit(), batch=2)[route].identifiable


@pytest.mark.parametrize("route", CLOSED_FORMS[:2])
def test_no_positions_refuse_the_closed_forms(route: str) -> None:
    verdict = identifiability(small_vit(pos_embed="none"))[route]
    assert not verdict.identifiable and "position embedding" in verdict.why


@pytest.mark.parametrize(
    ("rank", "steps", "identifiable"),
    [(8, 5, False), (16, 5, True), (32, None, True), (32, 1, False), (66, 1, True)],
)
def test_adapter_needs_rank_and_movement(rank: int, steps: int | None, identifiable: bool) -> None:
    base = small_vit()
    verdict = identifiability(base, adapter=_adapter(base, rank), steps=steps)["adapter_rowspace"]
    assert verdict.identifiable is identifiable
    assert ("A has not moved" in verdict.why) == (steps == 1)


def test_adapter_elsewhere_or_absent_is_refused() -> None:
    base = small_vit()
    assert not identifiability(base)["adapter_rowspace"].identifiable
    elsewhere = identifiability(base, adapter=_adapter(base, 32, "blocks.1.attn.qkv"))["adapter_rowspace"]
    assert not elsewhere.identifiable and FIRST_QKV in elsewhere.why


def test_searches_count_the_update_and_promise_nothing() -> None:
    base = small_vit()
    few = identifiability(base, adapter=_adapter(base, 2))["matching"]
    assert (few.unknowns, few.equations, few.identifiable) == (768, 576, False)
    enough = identifiability(base, adapter=_adapter(base, 8))["gauss_newton"]
    assert enough.identifiable and enough.equations == 8 * 288 and "search" in enough.why
    assert identifiability(base, adapter=_adapter(base, 8), steps=2)["matching"].equations == 8 * (288 + 96)
    assert not identifiability(base, adapter=_adapter(base, 8), batch=4)["amortised"].identifiable


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(R2FError, match="batch 0"):
        identifiability(small_vit(), batch=0)


def test_names_and_instances_count_alike_and_names_take_no_memory() -> None:
    by_name = identifiability("vit_tiny_patch16_224")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    assert by_name == identifiability(model)
    assert all(p.is_meta for p in shape_of("vit_tiny_patch16_224").model.parameters())
    plain = VisionTransformer(img_size=16, patch_size=4, embed_dim=96, depth=1, num_heads=4)
    assert identifiability(plain)["attention_rowspace"].identifiable
    with pytest.raises(R2FError, match="wrap it in a BaseModel"):
        identifiability(torch.nn.Linear(2, 2))
    with pytest.raises(R2FError, match="timm has no model of that name"):
        identifiability("vit_nonesuch")


def test_another_input_size_is_counted() -> None:
    assert not identifiability("vit_large_patch14_dinov2")["attention_rowspace"].identifiable
    at_224 = identifiability(shape_of("vit_large_patch14_dinov2", 224))
    assert (at_224["attention_rowspace"].unknowns, at_224["attention_rowspace"].equations) == (589, 767)
    with pytest.raises(R2FError, match="cannot be built"):
        shape_of("resnet18", 64)


def test_only_shared_gradients_count() -> None:
    base = small_vit()
    only = identifiability(base, shared=[QKV_WEIGHT])
    assert only["attention_rowspace"].identifiable and not only["patch_position"].identifiable
    assert "patch_embed.proj.weight is not shared" in only["patch_position"].why
    assert only["matching"].equations == 17 * (3 * 96 + 96 - 17) and "shared" in only["matching"].why
    rest = identifiability(base, shared=["pos_embed", "patch_embed.proj.weight"])
    assert rest["patch_position"].identifiable and "not shared" in rest["attention_rowspace"].why
    with pytest.raises(R2FError, match="no parameter nope"):
        identifiability(base, shared=["nope"])


def test_a_batch_names_the_directions_it_leaves_free() -> None:
    assert "leave 16 directions of every patch free" in identifiability(small_vit(), batch=2)["attention_rowspace"].why
