"""One small clip that many tests read."""

from pathlib import Path

import pytest

from ltx2_train.media.write import write_mp4
from tests.unit.media.media_files import FPS, RATE, click_waveform, ramp_frames


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 frames of 64 x 48 at 24 fps with clicks."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_mp4(path, ramp_frames(), FPS, click_waveform(), RATE, crf=4)
    return path
