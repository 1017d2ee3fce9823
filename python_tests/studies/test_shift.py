"""Public images of every kind, and the distance of updates."""

import pytest
import torch

from r2f_ext.data import ImageSet, content_hashes
from r2f_ext.errors import R2FError
from r2f_ext.inversion.amortised import AmortisedInverter
from r2f_ext.studies import FACES, Data, Row, Table, World, shift
from r2f_ext.studies.scene import Observed
from r2f_ext.studies.shift import a_distance, lost_to_controls, not_above, public_of, reconstructions, split_of, varied
from r2f_ext.types import Gradient


def test_victims_others_and_public_images_are_different_ones(embedded):
    split = split_of(embedded, FACES, 1, 20)
    parts = [content_hashes(each.images) for each in (split.victims, split.others, split.public)]
    assert len(parts[0]) == 20 and len(parts[1]) == len(parts[2]) == (100 - 20) // 2
    assert len(set().union(*parts)) == sum(map(len, parts))


def test_too_few_private_images_are_refused(embedded, monkeypatch):
    monkeypatch.setattr(shift, "LEAST", 41)
    with pytest.raises(R2FError, match="80 private images beside 20 victims, and 82 are needed"):
        split_of(embedded, FACES, 0, 20)


def test_varied_images_are_moved_or_mirrored_originals():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8)
    source = ImageSet("three", images, torch.tensor([4, 5, 6]))
    variants = {
        (label, _moved(image.flip(2) if flip else image, y, x).numpy().tobytes()): (y, x, flip)
        for image, label in zip(images, (4, 5, 6), strict=True)
        for flip in (False, True)
        for y in range(-2, 3)
        for x in range(-2, 3)
    }
    found = varied(source, 400, seed=1)
    seen = {
        variants[label, image.numpy().tobytes()]
        for image, label in zip(found.images, found.labels.tolist(), strict=True)
    }
    assert len(seen) == 50
    assert torch.equal(varied(source, 400, seed=1).images, found.images)


def _moved(image, y, x):
    rows, columns = (torch.arange(8) + y).clamp(0, 7), (torch.arange(8) + x).clamp(0, 7)
    return image[:, rows][:, :, columns]


def test_public_faces_come_from_the_public_half_and_others_from_their_set(embedded):
    world = World()
    public = split_of(embedded, FACES, 0, 20).public
    found = public_of(world, embedded, "faces", 0, 30, 20)
    assert torch.equal(found.images, varied(public, 30, 0).images) and found.labels.unique().numel() > 4
    assert public_of(world, embedded, "clothes", 0, 30, 20).name == "embedded"
    assert public_of(world, embedded, "procedural", 0, 30, 20).name == "procedural"
    own = World(data=(Data("mine", "lfw", "photos"),))
    assert public_of(own, embedded, "mine", 0, 30, 20).name == "lfw"


def test_too_few_public_images_are_refused(embedded):
    with pytest.raises(R2FError, match="'embedded' has 10000 public images, and 10001 are needed"):
        public_of(World(), embedded, "clothes", 0, 10_001, 20)


def updates(count, shift, seed, flipped=False):
    """Gaussian updates, one entry of which is shifted; flipped: every second update changes its sign, as labels do."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(count, 6, 2, generator=generator) for name in ("one", "two")}
    made["one"][:, 0, 0] += shift
    signs = 1 - 2 * (torch.arange(count) // 3 % 2) if flipped else torch.ones(count)
    return {name: each * signs[:, None, None] for name, each in made.items()}


@pytest.mark.parametrize("signed", [True, False])
def test_the_distance_is_0_for_equal_distributions_and_2_for_separable_ones(signed):
    assert a_distance(updates(200, 0.0, 1), updates(200, 0.0, 2), signed) < 0.4
    assert a_distance(updates(200, 30.0, 1), updates(200, -30.0 * signed, 2), signed) > 1.95
    assert 0.5 < a_distance(updates(200, 3.0, 1), updates(200, -1.0 * signed, 2), signed) < 1.95


def test_magnitudes_tell_apart_what_signs_hide():
    sets = updates(200, 30.0, 1, flipped=True), updates(200, 0.0, 2, flipped=True)
    assert a_distance(*sets) > 1.9 and a_distance(*sets, signed=True) < 0.4


def test_the_distance_reads_directions_alone_and_cuts_the_longer_set():
    first, second = updates(60, 2.0, 1), updates(80, -1.0, 2)
    louder = {name: 7 * each for name, each in first.items()}
    cut = {name: each[:60] for name, each in second.items()}
    assert a_distance(first, second) == pytest.approx(a_distance(louder, cut), abs=1e-9)


def test_the_stranger_is_of_the_victims_label_and_scored_against_the_victim():
    """One pixel per image and an update that tells it: what comes out is known."""
    labels = torch.arange(40) % 2
    images = torch.linspace(0, 1, 40)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    told = {"layer": torch.stack([images[:, 0, 0, 0], 1 - images[:, 0, 0, 0], labels.float()], 1)[:, :, None]}
    inverter = AmortisedInverter(told, images, labels, 2)
    observed = Observed({"layer": told["layer"][:4]}, {}, Gradient({}), images[:4, None], labels[:4, None])
    kind = ImageSet("kind", (255 * images[30:]).to(torch.uint8), labels[30:])
    public = ImageSet("public", torch.full((2, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    found = {
        each.labels["route"]: each.values
        for each in reconstructions(inverter, observed, {"layer": told["layer"][30:]}, kind, public, seed=0)
    }
    assert min(found["amortised"]) > 25 and max(found["stranger"]) < 6
    assert found["mean_image"][0] == pytest.approx(0.0)


def test_a_mean_is_above_another_when_the_paired_difference_is():
    """Wide intervals that overlap, and victims that all gain: only the pairing shows it."""
    control = Row({}, "psnr_db", (10.0, 20.0, 30.0), 10.0, 30.0)
    gains, mixed = (Row({}, "psnr_db", values, 0.0, 40.0) for values in ((11.0, 21.5, 31.0), (11.0, 19.0, 29.5)))
    assert not not_above(gains, control) and not_above(mixed, control) and not_above(control, gains)
    alone = Row({}, "psnr_db", (11.0,), None, None)
    assert not_above(alone, Row({}, "psnr_db", (10.0,), None, None))
    assert not not_above(None, control) and not not_above(gains, None) and not not_above(gains, alone)


def test_lost_controls_are_grouped_and_named():
    def row(where, metric, labels, value):
        return Row({"to": where, **labels}, metric, (value, value), value, value)

    table = Table(
        [
            *(row("a", "psnr_db", {"route": route}, value) for route, value in (("amortised", 12), ("stranger", 14))),
            *(row("b", "psnr_db", {"route": route}, value) for route, value in (("amortised", 18), ("stranger", 14))),
            row("a", "psnr_db", {"route": "mean_image"}, 13),
            row("b", "psnr_db", {"route": "mean_image"}, 19),
            row("a", "cosine", {"decoder": "ridge"}, 0.9),
            row("a", "cosine", {"decoder": "projection"}, 0.2),
        ]
    )
    assert lost_to_controls(table, {"to a": {"to": "a"}, "to b": {"to": "b"}}) == (
        "the amortised route by a stranger's update (to a); the amortised route by the mean public image (to a, to b)"
    )
    assert lost_to_controls(Table([]), {"to a": {"to": "a"}}) == ""
