"""Rotary tables at full size equal the published reference values."""

import torch

from ltx2_train import geometry
from ltx2_train.model.config import RopeType
from ltx2_train.model.rope import RopeCache, RopeSpec, build_rope, frequency_ladder

VIDEO = RopeSpec(3, 4096, 32, (20, 2048, 2048), 10000.0, True, RopeType.SPLIT)
AUDIO = RopeSpec(1, 2048, 32, (20,), 10000.0, True, RopeType.SPLIT)


def close(values: torch.Tensor, expected: list[float]):
    torch.testing.assert_close(values, torch.tensor(expected), atol=2e-7, rtol=1e-6)


def test_frequency_ladder():
    ladder = frequency_ladder(VIDEO, torch.device("cpu"))
    assert len(ladder) == 682
    torch.testing.assert_close(ladder[:3], torch.tensor([1.5707964, 1.5921853, 1.6138654]), rtol=1e-7, atol=0)
    torch.testing.assert_close(ladder[-3:], torch.tensor([15288.767, 15496.947, 15707.963]), rtol=1e-7, atol=0)


def test_video_tables():
    rope = build_rope(geometry.video_positions(121, 512, 768, 24.0)[None], VIDEO, torch.float32)
    assert rope.cos.shape == (1, 16 * 16 * 24, 32, 64)
    close(rope.cos[0, 0, 0, :6], [1, 1, 0.0032724838, 0.024541136, 0.024541136, -0.018070830])
    close(rope.sin[0, 0, 0, :6], [0, 0, -0.9999946, -0.9996988, -0.9996988, -0.9998367])
    close(rope.cos[0, 1000, 5, 10:14], [0.11115944, -0.98358220, 0.95707893, 0.17614911])
    close(rope.cos[0, 777, 31, -3:], [-0.8660370, 0.9238892, 0.3821845])


def test_audio_tables():
    rope = build_rope(geometry.audio_positions(126)[None], AUDIO, torch.float32)
    close(rope.cos[0, 0, 0, :3], [0.00078543, -0.01341319, -0.02773756])
    close(rope.cos[0, 125, 31, -2:], [-0.15093189, -0.99999994])


def test_tables_are_built_once_per_geometry_and_die_with_it():
    cache = RopeCache()
    positions = geometry.audio_positions(7)[None]
    first = cache.get(positions, AUDIO, torch.float32)
    assert cache.get(positions, AUDIO, torch.float32) is first
    assert cache.get(positions.clone(), AUDIO, torch.float32) is not first
    positions += 1
    assert cache.get(positions, AUDIO, torch.float32) is not first
    del positions, first
    assert not cache._tables
