"""A search keeps out of colours that no public image has."""

import torch

from r2f_ext.inversion.channels import colour_of, without_foreign_colours


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


GRAY = noise(20, 1, 4, 4).expand(-1, 3, -1, -1)
START = 0.3 + 0.4 * noise(2, 1, 4, 4, seed=1).expand(-1, 3, -1, -1)
FOUND = START + 0.1 * noise(2, 3, 4, 4, seed=2)


def test_from_gray_public_images_only_the_brightness_of_what_was_found_is_kept():
    kept = without_foreign_colours(FOUND, START, GRAY)
    torch.testing.assert_close(kept, FOUND.mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_the_colours_of_the_start_stay():
    start = START + torch.tensor([0.1, 0.0, -0.1]).view(3, 1, 1)
    kept = without_foreign_colours(start + 0.05, start, GRAY)
    torch.testing.assert_close(kept, start + 0.05)


def test_from_public_images_in_colour_everything_is_kept():
    coloured = GRAY + 0.02 * noise(20, 3, 4, 4, seed=3)
    assert without_foreign_colours(FOUND, START, coloured) is FOUND


def test_among_gray_and_coloured_public_images_a_gray_start_stays_gray_and_a_coloured_one_does_not():
    public = torch.cat([GRAY, noise(20, 3, 4, 4, seed=3)])
    start = START + torch.stack([torch.zeros(3), torch.tensor([0.1, 0.0, -0.1])])[:, :, None, None]
    kept = without_foreign_colours(start + (FOUND - START), start, public)
    assert float(colour_of(kept[:1])) < 1e-6
    torch.testing.assert_close(kept[0], FOUND[0].mean(0, keepdim=True).expand(3, -1, -1))
    torch.testing.assert_close(kept[1], start[1] + (FOUND - START)[1])


def test_a_single_tint_is_kept_and_the_others_are_not():
    tint = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
    kept = without_foreign_colours(FOUND, START, GRAY[:, :1] * tint)
    moved = (kept - START).movedim(1, -1).flatten(0, -2)
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 1
    along = tint.flatten() / tint.norm()
    torch.testing.assert_close(moved, (((FOUND - START).movedim(1, -1).flatten(0, -2)) @ along)[:, None] * along)


def test_one_channel_and_constant_images_change_nothing():
    one = FOUND[:, :1]
    assert without_foreign_colours(one, START[:, :1], GRAY[:, :1]) is one
    assert without_foreign_colours(FOUND, START, torch.full((5, 3, 4, 4), 0.5)) is FOUND
