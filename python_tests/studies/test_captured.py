import pytest
import torch

from r2f_ext.errors import R2FError
from r2f_ext.pairs import GeneratedPairs
from r2f_ext.studies import CLOTHES, World
from r2f_ext.studies.captured import CapturedPairs, capture_all
from r2f_ext.studies.scene import base_of, public_images, start_of, target_of

WORLD = World()


def test_pairs_of_some_layers_at_another_rank_are_those_that_the_model_makes():
    base = base_of(WORLD.base, WORLD.device)
    public = public_images(base, CLOTHES, 0, 130)
    captured = capture_all(target_of(base), public)
    target = target_of(base, 3, ["blocks.0.mlp.fc2", "blocks.2.attn.qkv"])
    a = start_of(target, 1)
    found, wanted = CapturedPairs(target, a, captured), GeneratedPairs(target, a, public)
    assert len(found) == len(wanted) == 130
    assert found.group_size == 1
    ours, theirs = list(found.batches(90, 115)), list(wanted.batches(90, 115))
    for name in target.names:
        for part in ("updates", "x", "delta"):
            one, two = (
                torch.cat([(each.updates if part == "updates" else getattr(each.gradients, part))[name] for each in of])
                for of in (ours, theirs)
            )
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    labels = torch.cat([each.labels for each in ours])
    assert torch.equal(labels[:, 0], public.labels[90:115])


def test_gradients_that_do_not_fit_into_memory_are_refused(monkeypatch):
    base = base_of(WORLD.base, WORLD.device)
    monkeypatch.setattr("r2f_ext.studies.captured.budget", lambda device: 1 << 20)
    with pytest.raises(R2FError, match="smaller base"):
        capture_all(target_of(base), public_images(base, CLOTHES, 0, 4))
