from itertools import pairwise

import pytest
import torch

from ltx2_train.codecs.ltx2_video import _decode_axes, _encode_axes
from ltx2_train.codecs.tiling import blend, ramp, spans


def paint(latents: torch.Tensor) -> torch.Tensor:
    """A decoder without surroundings: a latent is a box of one colour, the first one frame deep."""
    pixels = latents.repeat_interleave(8, 2).repeat_interleave(32, 3).repeat_interleave(32, 4)
    return pixels[:, :, 7:]


@pytest.mark.parametrize(("length", "size", "overlap"), [(5, 8, 2), (8, 8, 2), (9, 8, 2), (31, 8, 4), (100, 10, 1)])
def test_spans_cover_everything_and_share_the_overlap(length, size, overlap):
    cut = spans(length, size, overlap)
    assert (cut[0][0], cut[-1][1]) == (0, length)
    assert all(before[1] - after[0] == overlap for before, after in pairwise(cut))
    assert all(overlap < stop - start <= size for start, stop in cut) or len(cut) == 1


def test_a_tile_fades_in_from_nothing():
    assert ramp(4).tolist() == [0, 0.25, 0.5, 0.75]
    assert ramp(0).tolist() == []


def test_tiles_meet_where_they_should():
    latents = torch.randn(1, 2, 9, 7, 5)
    axes = _decode_axes(latents, tile=(96, 32), tile_frames=(32, 16))
    assert [len(axis.spans) for axis in axes] == [4, 3, 2]
    torch.testing.assert_close(blend(paint, latents, axes), paint(latents))
    pixels = paint(latents)
    encoded = blend(lambda x: x[:, :, ::8, ::32, ::32], pixels, _encode_axes(pixels, (96, 32)))
    torch.testing.assert_close(encoded, latents)
