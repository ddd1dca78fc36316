"""A small world of real files, packed once for all tests."""

from pathlib import Path

import pytest

from data_prep.buckets import parse_buckets
from data_prep.encode_config import EncodeConfig
from data_prep.pack import PackConfig, pack
from data_prep.synth import write_world
from ltx2_train.data.synthetic import WorldConfig
from ltx2_train.media.write import write_mp4
from tests.unit.media.media_files import FPS, RATE, click_waveform, ramp_frames

WORLD = WorldConfig(frames=17, silent_fraction=0.2, image_fraction=0.2)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`metadata.jsonl` of 14 clips of 17 frames, some silent, some single images."""
    return write_world(tmp_path_factory.mktemp("world"), 14, 3, WORLD)


@pytest.fixture(scope="session")
def raw(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world in raw shards of 3 files."""
    directory = tmp_path_factory.mktemp("raw")
    pack(world, directory, PackConfig(clips_per_shard=3))
    return directory


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty directory for the files of one test."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def config() -> EncodeConfig:
    """Buckets of the world's clips and images."""
    return EncodeConfig(buckets=parse_buckets("64x64x17;64x64x1"), video_text_width=16, audio_text_width=8)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 frames of 64 x 48 at 24 fps with clicks."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_mp4(path, ramp_frames(), FPS, click_waveform(), RATE, crf=4)
    return path
