"""Route `attention_rowspace` on the exact gradients of several images."""

import torch
from vit_cases import psnr, small_vit, smooth_images

from r2f_ext.inversion.exact_gradients import exact_gradients
from r2f_ext.inversion.route import Certainty, Problem
from r2f_ext.inversion.routes.attention_rowspace import AttentionRowspace


def test_every_image_of_its_own_gradient() -> None:
    base, images = small_vit(), smooth_images(2, 16)
    problem = Problem(base, gradients=exact_gradients(base, images, torch.tensor([0, 1])))
    told: list[int] = []
    found = AttentionRowspace().run(problem, told.append)
    assert psnr(found.images, images) > 45 and told == [1, 1] and found.route == "attention_rowspace"
    assert found.per_victim["expected_error"].shape == (2,)
    assert found.details["expected_error"] == float(found.per_victim["expected_error"].max())


def test_the_verdict_is_exact_or_says_why_not() -> None:
    route, base = AttentionRowspace(), small_vit()
    assert route.verdict(Problem(base)).certainty is Certainty.EXACT
    refused = route.verdict(Problem(base, batch=2))
    assert refused.certainty is Certainty.REFUSED and "2 images" in refused.why and not refused.identifiable
    assert "not shared" in route.verdict(Problem(base, shared=["pos_embed"])).why
