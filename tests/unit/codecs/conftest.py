import json
from pathlib import Path

import pytest
import torch

from ltx2_train.testing.released_codecs import codec_sections
from ltx2_train.weightfile import write_weights

SMALL = {"video_channels": 8, "audio_channels": 2, "mel_bins": 16}


def write(path: Path, sections: dict, tensors: dict) -> Path:
    write_weights(path, tensors, {"config": json.dumps(sections)})
    return path


@pytest.fixture(scope="session")
def parts():
    """Header sections and tensors of a generation, made once; do not change them in place."""
    made = {}

    def get(generation: str, **sizes):
        key = (generation, *sizes.items())
        if key not in made:
            made[key] = codec_sections(generation, **SMALL | sizes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def release(parts, tmp_path_factory):
    """The path of a file with all codecs of a generation, beside tensors of other components."""
    folder, written = tmp_path_factory.mktemp("releases"), {}

    def get(generation: str, **sizes) -> Path:
        key = (generation, *sizes.items())
        if key not in written:
            sections, tensors = parts(generation, **sizes)
            other = {"model.diffusion_model.patchify_proj.weight": torch.zeros(2, 2)}
            written[key] = write(folder / f"{len(written)}.safetensors", sections, other | tensors)
        return written[key]

    return get


@pytest.fixture
def altered(parts, tmp_path):
    """Writes a file of a generation after `change(sections, tensors)` and returns its path."""

    def get(change, generation: str = "2.3", **sizes) -> Path:
        sections, tensors = parts(generation, **sizes)
        sections, tensors = json.loads(json.dumps(sections)), dict(tensors)
        change(sections, tensors)
        return write(tmp_path / "altered.safetensors", sections, tensors)

    return get
