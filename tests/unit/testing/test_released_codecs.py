from functools import lru_cache
from math import prod

import pytest
import torch

from ltx2_train.codecs import ltx2
from ltx2_train.codecs.ltx2_config import Section
from ltx2_train.testing import released_codecs
from ltx2_train.testing.released_codecs import codec_sections

MILLIONS = {  # of parameters, without statistics
    "2.0": {
        "vae.encoder": 694.1,
        "vae.decoder": 528.4,
        "audio_vae.encoder": 21.3,
        "audio_vae.decoder": 31.9,
        "vocoder": 55.6,
    },
    "2.3": {
        "vae.encoder": 318.9,
        "vae.decoder": 407.2,
        "audio_vae.encoder": 21.3,
        "audio_vae.decoder": 31.9,
        "vocoder": 128.5,
    },
    "2.5": {
        "vae.encoder": 318.9,
        "vae.decoder": 417.1,
        "audio_vae.encoder": 21.3,
        "audio_vae.decoder": 31.9,
        "vocoder": 128.5,
    },
}
full_size_layout = lru_cache(released_codecs.full_size_layout)
BUFFERS = ("filter", "_basis")


@pytest.mark.parametrize("generation", MILLIONS)
def test_a_release_has_as_many_parameters_as_it_should(generation):
    layout = full_size_layout(generation)
    for part, millions in MILLIONS[generation].items():
        own = [s for key, (s, _) in layout.items() if key.startswith(f"{part}.") and not key.endswith(BUFFERS)]
        assert round(sum(map(prod, own)) / 1e6, 1) == millions, part


def test_a_release_has_as_many_tensors_as_it_should():
    count = {g: sum(key.startswith("vocoder.") for key in full_size_layout(g)) for g in ("2.0", "2.3")}
    assert count == {"2.0": 194, "2.3": 1227}


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("vae.encoder.conv_in.conv.weight", (128, 48, 3, 3, 3)),
        ("vae.encoder.down_blocks.7.conv.conv.weight", (128, 1024, 3, 3, 3)),
        ("vae.encoder.down_blocks.8.res_blocks.1.conv2.conv.bias", (1024,)),
        ("vae.encoder.conv_out.conv.weight", (129, 1024, 3, 3, 3)),
        ("vae.decoder.up_blocks.0.res_blocks.1.conv1.conv.weight", (1024, 1024, 3, 3, 3)),
        ("vae.decoder.up_blocks.7.conv.conv.weight", (512, 256, 3, 3, 3)),
        ("vae.decoder.conv_out.conv.weight", (48, 128, 3, 3, 3)),
        ("vae.per_channel_statistics.std-of-means", (128,)),
        ("audio_vae.encoder.down.1.block.0.nin_shortcut.conv.weight", (256, 128, 1, 1)),
        ("audio_vae.decoder.up.2.upsample.conv.conv.weight", (512, 512, 3, 3)),
        ("audio_vae.per_channel_statistics.mean-of-means", (128,)),
        ("vocoder.vocoder.conv_pre.weight", (1536, 128, 7)),
        ("vocoder.vocoder.resblocks.0.acts1.0.downsample.lowpass.filter", (1, 1, 12)),
        ("vocoder.mel_stft.stft_fn.forward_basis", (514, 1, 512)),
        ("vocoder.mel_stft.mel_basis", (64, 257)),
    ],
)
def test_keys_are_the_published_ones(key, shape):
    assert full_size_layout("2.3")[key] == (shape, torch.bfloat16)


def test_the_keys_of_the_diffusion_decoder_are_the_published_ones():
    layout = {key.removeprefix("vae.decoder."): shape for key, (shape, _) in full_size_layout("2.5").items()}
    assert layout["det_stages.0.0.attn.qkv.weight"] == (6144, 2048)
    assert layout["diff_blocks.7.attn.q_norm.weight"] == (64,)
    assert layout["diff_blocks.7.scale_shift_table"] == (7, 256)
    assert layout["t_embedder.mlp.2.weight"] == (384, 384)
    assert layout["upsamples.3.proj.bias"] == (2048,)
    assert not any("to_q" in key or "to_out" in key for key in layout)


@pytest.mark.parametrize("generation", MILLIONS)
def test_a_tiny_codec_has_keys_and_dtypes_of_the_release(generation):
    _, tensors = codec_sections(generation, video_channels=8, audio_channels=2, mel_bins=16)
    assert tensors.keys() <= full_size_layout(generation).keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_the_same_seed_gives_the_same_numbers_and_2_5_encodes_as_2_3():
    sizes = {"video_channels": 8, "audio_channels": 2, "mel_bins": 16}
    one, again, other = (codec_sections("2.3", seed, **sizes)[1] for seed in (0, 0, 1))
    key = "vae.encoder.conv_in.conv.weight"
    assert torch.equal(one[key], again[key])
    assert not torch.equal(one[key], other[key])
    assert torch.equal(one[key], codec_sections("2.5", **sizes)[1][key])


def test_the_temporal_upsampler_has_the_published_size():
    config = {"mid_channels": 512, "spatial_upsample": False, "temporal_upsample": True}
    tensors = ltx2.upsampler_module(Section("config", config)).state_dict()
    assert (len(tensors), 2 * sum(tensor.numel() for tensor in tensors.values())) == (72, 261_936_384)
