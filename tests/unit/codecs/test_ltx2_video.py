import json
import re
import sys

import pytest
import torch

from ltx2_train.codecs import (
    build_video_codec,
    has_video_codec,
    load_audio_codec,
    load_video_codec,
    ltx2,
    ltx2_config,
    name_of_video_codec,
    video_codec_name,
)
from ltx2_train.codecs.ltx2_config import Section
from ltx2_train.codecs.neighbourhood import NeighbourhoodProcessor, neighbourhood_attention
from ltx2_train.errors import CheckpointError, ConfigError, DataError
from ltx2_train.rng import generator
from ltx2_train.testing.released_codecs import full_sections
from ltx2_train.weightfile import write_weights

# How the official keys are called in diffusers, written out once more and by hand.
ENCODER = {
    "down_blocks.0.res_blocks": "down_blocks.0.resnets",
    "down_blocks.1.conv": "down_blocks.0.downsamplers.0.conv",
    "down_blocks.2.res_blocks": "down_blocks.1.resnets",
    "down_blocks.3.conv": "down_blocks.1.downsamplers.0.conv",
    "down_blocks.4.res_blocks": "down_blocks.2.resnets",
    "down_blocks.5.conv": "down_blocks.2.downsamplers.0.conv",
    "down_blocks.6.res_blocks": "down_blocks.3.resnets",
    "down_blocks.7.conv": "down_blocks.3.downsamplers.0.conv",
    "down_blocks.8.res_blocks": "mid_block.resnets",
}
DECODER = {
    "up_blocks.0.res_blocks": "mid_block.resnets",
    "up_blocks.0.time_embedder": "mid_block.time_embedder",
    "up_blocks.1.conv": "up_blocks.0.upsamplers.0.conv",
    "up_blocks.2.res_blocks": "up_blocks.0.resnets",
    "up_blocks.2.time_embedder": "up_blocks.0.time_embedder",
    "up_blocks.3.conv": "up_blocks.1.upsamplers.0.conv",
    "up_blocks.4.res_blocks": "up_blocks.1.resnets",
    "up_blocks.4.time_embedder": "up_blocks.1.time_embedder",
    "up_blocks.5.conv": "up_blocks.2.upsamplers.0.conv",
    "up_blocks.6.res_blocks": "up_blocks.2.resnets",
    "up_blocks.6.time_embedder": "up_blocks.2.time_embedder",
    "up_blocks.7.conv": "up_blocks.3.upsamplers.0.conv",
    "up_blocks.8.res_blocks": "up_blocks.3.resnets",
    "up_blocks.8.time_embedder": "up_blocks.3.time_embedder",
    "last_time_embedder": "time_embedder",
    "last_scale_shift_table": "scale_shift_table",
}
PEERS = {
    "2.0": {
        "decoder_block_out_channels": (16, 32, 64),
        "decoder_layers_per_block": (1,) * 4,
        "decoder_spatio_temporal_scaling": (True,) * 3,
        "decoder_inject_noise": (False,) * 4,
        "upsample_type": ("spatiotemporal",) * 3,
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2,) * 3,
        "encoder_spatial_padding_mode": "zeros",
        "decoder_spatial_padding_mode": "reflect",
    },
    "2.3": {
        "decoder_block_out_channels": (16, 32, 32, 64),
        "decoder_layers_per_block": (1,) * 5,
        "decoder_spatio_temporal_scaling": (True,) * 4,
        "decoder_inject_noise": (False,) * 5,
        "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        "upsample_residual": (False,) * 4,
        "upsample_factor": (2, 2, 1, 2),
        "encoder_spatial_padding_mode": "zeros",
        "decoder_spatial_padding_mode": "zeros",
    },
}


def by_hand(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under `vae.` for diffusers, whatever is of no use there left out."""
    named = {}
    for key, tensor in tensors.items():
        side, _, rest = key.removeprefix("vae.").partition(".")
        if key.startswith("vae.") and side in ("encoder", "decoder"):
            table = ENCODER if side == "encoder" else DECODER
            for official, theirs in table.items():
                if rest == official or rest.startswith(official + "."):
                    rest = theirs + rest[len(official) :]
                    break
            named[f"{side}.{rest}"] = tensor.float()
    named["latents_mean"] = tensors["vae.per_channel_statistics.mean-of-means"].float()
    named["latents_std"] = tensors["vae.per_channel_statistics.std-of-means"].float()
    return named


def peer(generation: str, tensors: dict[str, torch.Tensor], **options):
    from diffusers import AutoencoderKLLTX2Video

    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
        **PEERS[generation] | options,
    )
    vae.load_state_dict(by_hand(tensors), strict=True)
    return vae.eval().requires_grad_(False)


def picture(frames: int = 17, height: int = 64, width: int = 96, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=generator(frames, "picture")) * 2 - 1


def statistics(vae) -> tuple[torch.Tensor, torch.Tensor]:
    return vae.latents_mean.reshape(1, -1, 1, 1, 1), vae.latents_std.reshape(1, -1, 1, 1, 1)


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def generation(request):
    return request.param


def test_it_is_what_diffusers_makes_of_the_same_weights(generation, release, parts):
    codec, vae = load_video_codec(release(generation)), peer(generation, parts(generation)[1])
    mean, deviation = statistics(vae)
    latents = codec.encode(picture())
    assert latents.shape == (1, 8, 3, 2, 3)
    assert torch.equal(latents, (vae.encode(picture()).latent_dist.mode() - mean) / deviation)
    pixels = codec.decode(latents)
    assert pixels.shape == (1, 3, 17, 64, 96)
    assert torch.equal(pixels, vae.decode(latents * deviation + mean).sample)


def test_a_conditioned_decoder_gets_a_little_noise_and_the_time(generation, release, parts):
    codec = load_video_codec(release(generation, timestep_conditioning=True))
    vae = peer(generation, parts(generation, timestep_conditioning=True)[1], timestep_conditioning=True)
    mean, deviation = statistics(vae)
    latents = torch.randn(1, 8, 2, 2, 2, generator=generator(0))
    noise = torch.randn(latents.shape, generator=generator(5, "decode"))
    noisy = 0.975 * latents + 0.025 * noise
    theirs = vae.decode(noisy * deviation + mean, temb=torch.tensor([0.05])).sample
    assert torch.equal(codec.decode(latents, seed=5), theirs)
    assert not torch.equal(codec.decode(latents, seed=6), theirs)


def test_a_clip_begins_as_its_beginning(generation, release):
    codec, clip = load_video_codec(release(generation)), picture(17)
    whole = codec.encode(clip)
    for frames, latents in ((9, 2), (1, 1)):
        torch.testing.assert_close(codec.encode(clip[:, :, :frames]), whole[:, :, :latents], atol=2e-6, rtol=0)


@pytest.mark.parametrize("chunk_frames", [8, 16, 24, 64])
def test_pieces_of_a_clip_are_encoded_as_the_whole(generation, release, chunk_frames):
    codec, clip = load_video_codec(release(generation)), picture(41, 32, 64, batch=2)
    pieces = codec.encode(clip, chunk_frames=chunk_frames)
    torch.testing.assert_close(pieces, codec.encode(clip), atol=5e-6, rtol=0)


def test_no_layer_sees_more_than_a_piece(release):
    codec, seen = load_video_codec(release("2.3")), []
    for layer in codec.encoder.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[2]))
    codec.encode(picture(41, 32, 32), chunk_frames=8)
    assert max(seen) == 8 + 1 + 3  # the first frame, two before it, and the one that a downsampler adds


def test_pieces_of_full_width_channels_too(parts, tmp_path):
    sections, tensors = parts("2.3", video_channels=128)
    write_weights(tmp_path / "wide.safetensors", tensors, {"config": json.dumps(sections)})
    codec, clip = load_video_codec(tmp_path / "wide.safetensors"), picture(17, 32, 32)
    torch.testing.assert_close(codec.encode(clip, chunk_frames=8), codec.encode(clip), atol=1e-5, rtol=0)


def test_pieces_have_eight_frames_or_a_multiple(release):
    with pytest.raises(ConfigError, match="chunk_frames=12; .*multiple of 8"):
        load_video_codec(release("2.3")).encode(picture(), chunk_frames=12)


def test_one_tile_is_the_whole(release):
    codec, clip = load_video_codec(release("2.3")), picture()
    latents = codec.encode(clip)
    assert torch.equal(codec.encode(clip, tile=(128, 32)), latents)
    assert torch.equal(codec.decode(latents, tile=(128, 32), tile_frames=(24, 8)), codec.decode(latents))


def test_tiles_come_near_the_whole_but_do_not_meet_it(release):
    codec, clip = load_video_codec(release("2.3")), picture(9, 192, 160)
    whole, tiled = codec.encode(clip), codec.encode(clip, tile=(128, 64), chunk_frames=8)
    error = (tiled - whole).square().mean().sqrt() / whole.square().mean().sqrt()
    assert 1e-3 < error < 0.5


def test_a_long_decode_goes_in_pieces(release):
    codec = load_video_codec(release("2.3"))
    latents = torch.randn(1, 8, 4, 3, 2, generator=generator(0))
    whole, tiled = codec.decode(latents), codec.decode(latents, tile=(64, 32), tile_frames=(16, 8))
    assert tiled.shape == whole.shape == (1, 3, 25, 96, 64)
    assert 0 < (tiled - whole).square().mean() < whole.square().mean()


@pytest.mark.parametrize("tile", [(100, 32), (128, 96), (128, 0)])
def test_tiles_that_do_not_fit_the_grid_are_refused(release, tile):
    with pytest.raises(ConfigError, match="multiples of 32"):
        load_video_codec(release("2.3")).encode(picture(), tile=tile)


def test_the_name_is_that_of_the_latents(release, parts, tmp_path):
    names = {generation: load_video_codec(release(generation)).name for generation in ("2.0", "2.3", "2.5")}
    assert all(re.fullmatch("ltx2-video-[0-9a-f]{16}", name) for name in names.values())
    assert names["2.0"] != names["2.3"] == names["2.5"]  # 2.5 decodes otherwise, what it encodes is the same
    assert names["2.3"] != load_video_codec(release("2.3", video_channels=16)).name


def test_the_name_is_the_same_from_every_form_of_the_file(release, parts, tmp_path):
    sections, tensors = parts("2.3")
    bare = {key.removeprefix("vae."): tensor for key, tensor in tensors.items() if key.startswith("vae.")}
    write_weights(tmp_path / "vae.safetensors", bare, {"config": json.dumps({"vae": sections["vae"]})})
    peer("2.3", tensors).bfloat16().save_pretrained(tmp_path / "pipeline" / "vae")
    clip, whole = picture(), load_video_codec(release("2.3"))
    for path in (tmp_path / "vae.safetensors", tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        codec = load_video_codec(path)
        assert codec.name == whole.name
        assert torch.equal(codec.decode(codec.encode(clip)), whole.decode(whole.encode(clip)))


def test_a_name_costs_no_weights(release, monkeypatch):
    names = {path: load_video_codec(path).name for path in (release("2.0"), release("2.5"))}
    monkeypatch.setattr("ltx2_train.codecs.ltx2.fill", None)
    assert all(video_codec_name(path) == name_of_video_codec(str(path)) == name for path, name in names.items())
    assert name_of_video_codec("dct") == build_video_codec("dct").name
    with pytest.raises(ConfigError, match="no-such-file"):
        name_of_video_codec("no-such-file.safetensors")


def test_a_video_vae_is_found_in_every_form_of_weights(release, parts, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.safetensors").symlink_to(release("2.3"))  # no folder of diffusers
    peer("2.3", parts("2.3")[1]).bfloat16().save_pretrained(tmp_path / "pipeline" / "vae")
    write_component(tmp_path / "pipeline" / "transformer", "LTX2VideoTransformer3DModel")
    pipeline = [tmp_path / "pipeline", tmp_path / "pipeline" / "vae", tmp_path / "pipeline" / "transformer"]
    for path in (release("2.3"), tmp_path / "folder", *pipeline):
        assert has_video_codec(path), path
        assert video_codec_name(path) == video_codec_name(release("2.3"))


def test_weights_without_a_video_vae_have_none(altered, tmp_path):
    write_component(tmp_path / "pipeline" / "transformer", "LTX2VideoTransformer3DModel")
    for path in (altered(no_tensors), tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        assert not has_video_codec(path), path
    with pytest.raises(CheckpointError, match=r"transformer/config.json\._class_name is 'LTX2VideoTransformer3DModel'"):
        load_video_codec(tmp_path / "pipeline" / "transformer")
    with pytest.raises(CheckpointError, match="cannot be read"):
        has_video_codec(tmp_path / "nowhere")


def write_component(folder, kind):
    write_weights(folder / "model.safetensors", {"weight": torch.zeros(2, 2)}, {})
    (folder / "config.json").write_text(json.dumps({"_class_name": kind}))


def test_without_the_library_the_error_says_what_to_install(release, monkeypatch):
    for name in ("diffusers", "diffusers.pipelines.ltx2", "diffusers.pipelines.ltx2.vocoder"):
        monkeypatch.setitem(sys.modules, name, None)
    for load, generation in ((load_video_codec, "2.3"), (load_video_codec, "2.5"), (load_audio_codec, "2.3")):
        with pytest.raises(ConfigError, match=r'pip install "ltx2_train\[released\]"'):
            load(release(generation))


def test_tensors_come_to_the_codec_from_other_devices(release):
    codec = load_video_codec(release("2.3"))
    codec.mean, codec.deviation = codec.mean.to("meta"), codec.deviation.to("meta")  # a device that every machine has
    for values in (codec.normalise(torch.zeros(1, 8, 1, 2, 2)), codec.unnormalise(torch.zeros(1, 8, 1, 2, 2))):
        assert (values.device.type, values.dtype) == ("meta", torch.float32)


def test_a_name_of_a_codec_may_be_a_path(release):
    assert build_video_codec(str(release("2.3"))).name == load_video_codec(release("2.3")).name
    with pytest.raises(ConfigError, match="no-such-file.*'dct'"):
        build_video_codec("no-such-file.safetensors")
    with pytest.raises(ConfigError, match="ltx2-video-0123 is a released one.*path of its file"):
        build_video_codec("ltx2-video-0123")


def test_bf16_is_close_and_nothing_learns(release):
    exact, coarse = load_video_codec(release("2.3")), load_video_codec(release("2.3"), dtype=torch.bfloat16)
    latents, rounded = exact.encode(picture()), coarse.encode(picture())
    assert rounded.dtype == torch.float32
    assert (latents - rounded).square().mean().sqrt() < 0.05 * latents.square().mean().sqrt()
    assert not latents.requires_grad
    assert not any(p.requires_grad for p in exact.encoder.parameters())


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 3, 10, 32, 32), "10 frames"),
        (torch.zeros(1, 3, 9, 40, 32), "height of 40"),
        (torch.zeros(3, 9, 32, 32), "shape"),
        (torch.full((1, 3, 1, 32, 32), float("nan")), "nan"),
        (torch.full((1, 3, 1, 32, 32), 255.0), "255"),
        (torch.zeros(1, 3, 1, 32, 32, dtype=torch.uint8), "uint8"),
    ],
)
def test_what_is_no_clip_is_refused(release, video, message):
    with pytest.raises(DataError, match=message):
        load_video_codec(release("2.3")).encode(video)


def test_latents_of_other_sizes_are_refused(release):
    with pytest.raises(DataError, match=r"needs \(B, 8"):
        load_video_codec(release("2.3")).decode(torch.zeros(1, 128, 1, 2, 2))
    with pytest.raises(DataError, match="2 x 2"):  # the decoder of 2.0 reflects its borders
        load_video_codec(release("2.0")).decode(torch.zeros(1, 8, 1, 1, 2))


# --- headers ---


def test_a_general_padding_mode_governs_both_halves():
    vae = full_sections("2.0")["vae"]
    for own, encoder, decoder in (
        ({}, "zeros", "reflect"),
        ({"encoder_spatial_padding_mode": "reflect"}, "reflect", "reflect"),
        ({"spatial_padding_mode": "zeros", "encoder_spatial_padding_mode": "reflect"}, "zeros", "zeros"),
    ):
        section = Section("config.vae", vae | own)
        assert ltx2_config.video_encoder(section)["encoder_spatial_padding_mode"] == encoder
        assert ltx2_config.video_decoder(section)["decoder_spatial_padding_mode"] == decoder


def test_the_released_headers_give_the_known_arguments():
    section = Section("config.vae", full_sections("2.3")["vae"])
    encoder, decoder = ltx2_config.video_encoder(section), ltx2_config.video_decoder(section)
    assert encoder["block_out_channels"] == (256, 512, 1024, 1024)
    assert encoder["layers_per_block"] == decoder["decoder_layers_per_block"] == (4, 6, 4, 2, 2)
    assert decoder["decoder_block_out_channels"] == (256, 512, 512, 1024)
    assert decoder["upsample_type"] == ("spatiotemporal", "spatiotemporal", "temporal", "spatial")
    assert decoder["upsample_factor"] == (2, 2, 1, 2)
    assert (decoder["timestep_conditioning"], decoder["decoder_causal"]) == (False, False)


def test_a_header_that_does_not_say_means_a_conditioned_decoder():
    vae = full_sections("2.3")["vae"]
    del vae["timestep_conditioning"]
    assert ltx2_config.video_decoder(Section("config.vae", vae))["timestep_conditioning"]


def no_config(sections, tensors):
    del sections["vae"]


def missing(sections, tensors):
    del tensors["vae.decoder.up_blocks.8.res_blocks.0.conv1.conv.weight"]


def surplus(sections, tensors):
    tensors["vae.decoder.up_blocks.9.conv.conv.weight"] = torch.zeros(2)


def misshapen(sections, tensors):
    tensors["vae.encoder.conv_in.conv.weight"] = tensors["vae.encoder.conv_in.conv.weight"][:, :40]


def not_finite(sections, tensors):
    tensors["vae.encoder.conv_in.conv.bias"] = torch.full((8,), float("inf"))


def no_statistics(sections, tensors):
    del tensors["vae.per_channel_statistics.std-of-means"]


def short_statistics(sections, tensors):
    tensors["vae.per_channel_statistics.std-of-means"] = torch.ones(4)


def no_deviation(sections, tensors):
    tensors["vae.per_channel_statistics.std-of-means"] = torch.zeros(8)


def no_tensors(sections, tensors):
    for key in [key for key in tensors if key.startswith("vae.")]:
        del tensors[key]


def attention(sections, tensors):
    sections["vae"]["encoder_blocks"][1] = ["attn", {}]


def other_class(sections, tensors):
    sections["vae"]["_class_name"] = "AutoencoderKL"


def finer(sections, tensors):
    sections["vae"]["patch_size"] = 2


def other_norm(sections, tensors):
    sections["vae"]["norm_layer"] = "group_norm"


def whole_numbers(sections, tensors):
    tensors["vae.encoder.conv_in.conv.bias"] = torch.zeros(8, dtype=torch.int32)


def block(value, *place):
    """Puts a value into the list of the encoder's blocks, or in place of it."""

    def change(sections, tensors):
        owner, key = sections["vae"], "encoder_blocks"
        for step in place:
            owner, key = owner[key], step
        owner[key] = value

    return change


def negative(sections, tensors):
    sections["vae"]["in_channels"] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (whole_numbers, r"1 weights are .* not read: encoder\.conv_in\.conv\.bias is torch.int32"),
        (block(None), "encoder_blocks is None; supported is a list of pairs"),
        (block(["res_x"], 0), r"encoder_blocks is .*res_x.*; supported is a list of pairs"),
        (block(5, 1), "encoder_blocks is 5; supported is a list of pairs"),
        (block([], 1, 0), "supported is a list of pairs, each of a name and options"),
        (block(10**7, 0, 1), r"layers_per_block=\(10000000, .* layers to 64"),
        (block({"num_layers": "x"}, 0, 1), "no codec can be built from it"),
        (block({"multiplier": {}}, 1, 1), "config.vae: no codec can be built from it"),
        (negative, "in_channels=-1; supported are finite numbers, whole ones from 1"),
        (no_config, r"no `config\.vae` in the header"),
        (missing, r"1 missing: decoder\.up_blocks\.8\.res_blocks\.0\.conv1\.conv\.weight"),
        (surplus, r"1 surplus: decoder\.up_blocks\.9\.conv\.conv\.weight"),
        (misshapen, r"encoder\.conv_in\.conv\.weight \[8, 40, 3, 3, 3\] instead of \[8, 48"),
        (not_finite, r"encoder\.conv_in\.conv\.bias is not finite"),
        (no_statistics, "std-of-means is missing"),
        (short_statistics, r"std-of-means \[4\] instead of \[8\]"),
        (no_deviation, "not finite and positive"),
        (no_tensors, "no tensors under vae"),
        (attention, "encoder_blocks is .*attn"),
        (other_class, "AutoencoderKL"),
        (finer, "16 x 16 pixels of 8 frames"),
        (other_norm, "norm_layer is 'group_norm'"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(altered, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load_video_codec(altered(change))
    assert "altered.safetensors" in str(error.value)


@pytest.mark.parametrize("kernel", [[3, 3], [3, 3, "x"], [3, 3, None], "xxx", [3, 3, -1]])
@pytest.mark.parametrize("field", ["stage5_kernel", "stage_kernels"])
def test_windows_that_no_attention_has_are_refused_before_they_are_used(field, kernel):
    """No tensor has their size, so only the header can tell."""
    section = full_sections("2.5")["vae"]
    section["decoder"][field] = kernel if field == "stage5_kernel" else [kernel, *section["decoder"][field][1:]]
    with pytest.raises(CheckpointError, match="config.vae: "):
        ltx2.video_modules(Section("config.vae", section))


def test_a_cut_file_is_refused(release, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(release("2.3").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="was cut"):
        load_video_codec(cut)


# --- the decoder of 2.5 ---


def diffusion_peer(tensors: dict[str, torch.Tensor]):
    from diffusers import LTX2VideoDiffusionDecoderModel

    model = LTX2VideoDiffusionDecoderModel(
        latent_channels=8,
        decoder_head_dim=8,
        decoder_stage_channels=(64, 32, 16, 16, 8),
        decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_stage_kernels=((3, 3, 3),) * 4,
        decoder_stage5_kernel=(3, 3, 3),
    )
    named = {"latents_mean": torch.zeros(8), "latents_std": torch.ones(8)}
    for key, tensor in tensors.items():
        if not key.startswith("vae.decoder.") or key.endswith("type_emb"):
            continue
        name = key.removeprefix("vae.").replace("attn.proj", "attn.to_out.0")
        name = name.replace("q_norm", "norm_q").replace("k_norm", "norm_k")
        name = name.replace("mlp.0.", "timestep_embedder.linear_1.").replace("mlp.2.", "timestep_embedder.linear_2.")
        if ".qkv." in name:
            for part, third in zip("qkv", tensor.float().chunk(3), strict=True):
                named[name.replace("qkv", f"to_{part}")] = third
        else:
            named[name] = tensor.float()
    model.load_state_dict(named, strict=True)
    return model.eval().requires_grad_(False)


LIBRARY = [pytest.param(False, id="our-attention"), pytest.param(True, id="its-attention", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("whole_library", LIBRARY)
def test_the_diffusion_decoder_is_what_diffusers_makes_of_the_same_weights(release, parts, whole_library):
    codec, theirs = load_video_codec(release("2.5")), diffusion_peer(parts("2.5")[1])
    if not whole_library:
        theirs.set_attn_processor(NeighbourhoodProcessor())
    latents = torch.randn(1, 8, 2, 3, 3, generator=generator(0))
    expected = theirs.decode(codec.unnormalise(latents), generator=generator(3, "decode")).sample
    pixels = codec.decode(latents, seed=3)
    assert pixels.shape == (1, 3, 9, 96, 96)
    torch.testing.assert_close(pixels, expected, atol=2e-5 if whole_library else 0, rtol=0)
    assert torch.equal(codec.decode(latents, seed=3), pixels)
    assert not torch.equal(codec.decode(latents, seed=4), pixels)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("grid", [(3, 3, 3), (5, 6, 9), (1, 9, 17)])
def test_a_layer_attends_as_the_library_s_does(parts, grid):
    layer = diffusion_peer(parts("2.5")[1]).decoder.det_stages[0][0].attn
    layer.kernel_size = (1, 3, 3) if grid[0] == 1 else (3, 3, 3)
    hidden = torch.randn(2, *grid, 64, generator=generator(0))
    theirs = layer(hidden)
    layer.set_processor(NeighbourhoodProcessor())
    torch.testing.assert_close(layer(hidden), theirs, atol=1e-5, rtol=0)


def test_it_decodes_what_is_smaller_than_its_windows(release):
    codec = load_video_codec(release("2.5"))
    assert codec.decode(torch.zeros(1, 8, 1, 1, 2)).shape == (1, 3, 1, 32, 64)


def test_gates_belong_to_the_layers_they_scale(altered, release):
    gates = {layer: torch.rand(8) + 0.5 for layer in ("gate_msa", "gate_mlp", "gate_ctx")}

    def gated(sections, tensors):
        for gate, values in gates.items():
            tensors[f"vae.decoder.diff_blocks.1.{gate}"] = values

    plain, other = load_video_codec(release("2.5")), load_video_codec(altered(gated, "2.5"))
    ours, block = other.decoder.diff_blocks[1], plain.decoder.diff_blocks[1]
    torch.testing.assert_close(ours.attn.to_out[0].bias, block.attn.to_out[0].bias * gates["gate_msa"])
    torch.testing.assert_close(ours.mlp.w_down.weight, block.mlp.w_down.weight * gates["gate_mlp"][:, None])
    torch.testing.assert_close(ours.context_proj.weight, block.context_proj.weight * gates["gate_ctx"][:, None])
    assert torch.equal(
        other.decoder.diff_blocks[0].context_proj.weight, plain.decoder.diff_blocks[0].context_proj.weight
    )


def test_a_neighbourhood_is_a_full_window_moved_inward_at_the_border():
    query, key, value = torch.randn(3, 1, 5, 9, 11, 2, 4, generator=generator(0)).unbind(0)
    window = (3, 5, 7)
    ours = neighbourhood_attention(query, key, value, window)
    for place in ((0, 0, 0), (2, 4, 5), (4, 8, 10), (1, 7, 3), (3, 0, 8)):
        starts = [min(max(i - k // 2, 0), n - k) for i, k, n in zip(place, window, (5, 9, 11), strict=True)]
        t, h, w = (slice(s, s + k) for s, k in zip(starts, window, strict=True))
        scores = torch.einsum("nk,thwnk->nthw", query[0][place], key[0, t, h, w]).flatten(1).softmax(1)
        expected = torch.einsum("ni,ink->nk", scores, value[0, t, h, w].flatten(0, 2))
        torch.testing.assert_close(ours[0][place], expected)
