import pytest
import torch

from ltx2_train.codecs import load_upsampler, load_video_codec
from ltx2_train.errors import CheckpointError, DataError
from ltx2_train.rng import generator
from ltx2_train.testing.released_codecs import upsampler_file
from ltx2_train.weightfile import open_weights, write_weights

KINDS = {
    "x2": ((3, 8, 6), {"use_rational_resampler": False}),
    "x2-rational": ((3, 8, 6), {"rational_spatial_scale": 2.0}),
    "x1.5": ((3, 6, 5), {"rational_spatial_scale": 1.5}),
    "temporal-x2": ((5, 4, 3), {"spatial_upsample": False, "temporal_upsample": True}),
}


def peer(tensors: dict[str, torch.Tensor], **options):
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel

    model = LTX2LatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1, **options)
    model.load_state_dict(tensors, strict=True)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_diffusers_makes_of_the_same_weights(kind, release, tmp_path):
    path, (size, options) = upsampler_file(tmp_path / "upsampler.safetensors", kind, channels=8), KINDS[kind]
    model = peer({key: tensor.read().float() for key, tensor in open_weights(path).items()}, **options)
    codec, latents = load_video_codec(release("2.3")), torch.randn(1, 8, 3, 4, 3, generator=generator(0))
    mean, deviation = codec.mean, codec.deviation
    ours = load_upsampler(path)(latents, codec)
    assert ours.shape == (1, 8, *size)
    assert torch.equal(ours, (model(latents * deviation + mean) - mean) / deviation)
    model.save_pretrained(tmp_path / "pipeline" / "latent_upsampler")
    assert torch.equal(load_upsampler(tmp_path / "pipeline")(latents, codec), ours)


def test_a_file_that_is_not_whole_is_refused(release, tmp_path):
    whole = open_weights(upsampler_file(tmp_path / "upsampler.safetensors", "x2", channels=8))
    kept = {key: tensor for key, tensor in whole.items() if key != "final_conv.bias"}
    write_weights(tmp_path / "cut.safetensors", kept, {"config": '{"in_channels": 8, "mid_channels": 32}'})
    with pytest.raises(CheckpointError, match=r"missing: .*final_conv\.bias"):
        load_upsampler(tmp_path / "cut.safetensors")


def test_a_video_vae_is_no_upsampler(release):
    with pytest.raises(CheckpointError, match="does not fit its header"):
        load_upsampler(release("2.3"))


def test_latents_of_other_channels_are_refused(release, tmp_path):
    upsampler = load_upsampler(upsampler_file(tmp_path / "upsampler.safetensors", "x2"))
    with pytest.raises(DataError, match=r"needs \(B, 128"):
        upsampler(torch.zeros(1, 8, 1, 2, 2), load_video_codec(release("2.3")))


def test_latents_upsampler_and_codec_may_be_on_devices_of_their_own(release, tmp_path):
    codec, latents = load_video_codec(release("2.3")), torch.zeros(1, 8, 1, 2, 2)
    path = upsampler_file(tmp_path / "upsampler.safetensors", "x2", channels=8)
    codec.mean, codec.deviation = codec.mean.to("meta"), codec.deviation.to("meta")
    upsampled = load_upsampler(path, device="meta")(latents, codec)
    assert (upsampled.device.type, upsampled.shape, upsampled.dtype) == ("meta", (1, 8, 1, 4, 4), torch.float32)
