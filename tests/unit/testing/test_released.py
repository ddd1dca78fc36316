"""The tiny files stand for the released ones: at full size their layout has the published counts and bytes."""

import json

import pytest
import torch
from safetensors import safe_open

from ltx2_train.model import named_config
from ltx2_train.testing.released import text_projection_shapes, transformer_shapes, write_release
from ltx2_train.weightfile import open_weights


@pytest.mark.parametrize(
    ("name", "tensors", "projections"),
    [("ltx2_19b", 3568, 188160 * 3840), ("ltx2_3_22b", 4444, 1_156_061_184), ("ltx2_5_22b", 4349, 1_156_061_184)],
)
def test_counts_at_full_size(name: str, tensors: int, projections: int):
    config = named_config(name)
    assert len(transformer_shapes(config)) == tensors
    assert sum(s.numel() for s in text_projection_shapes(config, 3840, 49).values()) == projections


def test_bytes_of_the_published_2_5_transformer():
    """42,017,512,960 is the size of its data: bf16, the tables fp32."""
    from ltx2_train.model.weights import released_dtype

    shapes = transformer_shapes(named_config("ltx2_5_22b"))
    assert sum(shape.numel() * released_dtype(key).itemsize for key, shape in shapes.items()) == 42_017_512_960


def test_a_monolith_holds_everything_and_a_pack_is_a_file_for_each(tmp_path):
    whole = write_release(tmp_path, "2.3")
    assert len({getattr(whole, part) for part in whole.__slots__}) == 1
    assert {"transformer", "scheduler", "vae", "audio_vae", "vocoder"} == open_weights(whole.vocoder).config().keys()
    pack = write_release(tmp_path, "2.5")
    assert len({getattr(pack, part) for part in pack.__slots__}) == 4
    assert open_weights(pack.transformer).config().keys() == {"transformer", "scheduler"}
    assert open_weights(pack.video_vae).config("vae")["_class_name"] == "CausalDiffusionVAE"
    for path in (pack.transformer, pack.text_projection, pack.video_vae, pack.audio_vae):
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["gemma_source_checkpoint"])["gemma_version"] == "gemma4-12b-ltx-v1"


def test_a_release_is_a_function_of_its_seed(tmp_path):
    seeds = [(0, "a"), (0, "b"), (1, "c")]
    releases = [write_release(tmp_path / d, "2.0", seed=s, parts=("transformer", "text_projection")) for s, d in seeds]
    contents = [release.transformer.read_bytes() for release in releases]
    assert contents[0] == contents[1] != contents[2]
    assert all(bool(torch.count_nonzero(tensor.read())) for tensor in open_weights(releases[0].transformer).values())
