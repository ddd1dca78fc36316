import json
import re

import pytest
import torch

from ltx2_train import geometry
from ltx2_train.codecs import (
    audio_codec_name,
    build_audio_codec,
    has_audio_codec,
    load_audio_codec,
    ltx2_config,
    name_of_audio_codec,
)
from ltx2_train.codecs.ltx2_config import Section
from ltx2_train.codecs.mel import LogMel
from ltx2_train.errors import CheckpointError, ConfigError, DataError
from ltx2_train.rng import generator
from ltx2_train.testing.released_codecs import full_sections
from ltx2_train.weightfile import write_weights

KERNELS = {"resnet_kernel_sizes": [3, 7, 11], "resnet_dilations": [[1, 3, 5]] * 3}
FIRST = {"upsample_kernel_sizes": [11, 4, 4, 4, 4, 4], "upsample_factors": [5, 2, 2, 2, 2, 2]}
SECOND = {"upsample_kernel_sizes": [12, 11, 4, 4, 4], "upsample_factors": [6, 5, 2, 2, 2]}


def sound(seconds: float = 0.2, rate: int = 16000) -> torch.Tensor:
    return 0.1 * torch.randn(1, 2, round(seconds * rate), generator=generator("sound"))


def peer(tensors: dict[str, torch.Tensor], **options):
    from diffusers import AutoencoderKLLTX2Audio

    vae = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16, **options
    )
    named = {}
    for key, tensor in tensors.items():
        if key.startswith(("audio_vae.encoder.", "audio_vae.decoder.")):
            named[key.removeprefix("audio_vae.")] = tensor.float()
    named["latents_mean"] = tensors["audio_vae.per_channel_statistics.mean-of-means"].float()
    named["latents_std"] = tensors["audio_vae.per_channel_statistics.std-of-means"].float()
    vae.load_state_dict(named, strict=True)
    return vae.eval().requires_grad_(False)


def vocoder_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {}
    for key, tensor in tensors.items():
        if key.startswith("vocoder."):
            name = key.removeprefix("vocoder.").replace("conv_pre", "conv_in").replace("conv_post", "conv_out")
            name = name.replace("resblocks", "resnets").replace("act_post", "act_out").replace(".lowpass", "")
            named[re.sub(r"(^|\.)ups\.", r"\1upsamplers.", name)] = tensor.float()
    return named


def first_vocoder(tensors):
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    sizes = {"upsample_kernel_sizes": [16, 15, 8, 4, 4], "upsample_factors": [6, 5, 2, 2, 2]}
    vocoder = LTX2Vocoder(in_channels=32, hidden_channels=64, **sizes | KERNELS)
    vocoder.load_state_dict(vocoder_names(tensors), strict=True)
    return vocoder.eval().requires_grad_(False)


def second_vocoder(tensors):
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    second = {f"bwe_{key}": value for key, value in (SECOND | KERNELS).items()}
    vocoder = LTX2VocoderWithBWE(
        in_channels=32, hidden_channels=128, bwe_hidden_channels=64, final_act_fn="clamp", **FIRST | KERNELS | second
    )
    vocoder.load_state_dict(vocoder_names(tensors), strict=True)
    return vocoder.eval().requires_grad_(False)


VOCODERS = {"2.0": first_vocoder, "2.3": second_vocoder}


@pytest.fixture(scope="module")
def codec(release):
    return load_audio_codec(release("2.3"))


def test_the_vae_is_what_diffusers_makes_of_the_same_weights(codec, parts):
    vae = peer(parts("2.3")[1])
    tokens = vae.encode(codec.mel(sound(), 16000)).latent_dist.mode().permute(0, 2, 1, 3).flatten(2)
    theirs = ((tokens - vae.latents_mean) / vae.latents_std).unflatten(2, (2, 4)).permute(0, 2, 1, 3)
    latents = codec.encode(sound(), 16000)
    assert latents.shape == (1, 2, 5, 4)
    assert theirs.shape == (1, 2, 6, 4)  # a centred spectrum has a frame more, and the encoder rounds up
    assert torch.equal(latents, theirs[:, :, :5])
    raw = latents.permute(0, 2, 1, 3).flatten(2) * vae.latents_std + vae.latents_mean
    mel = vae.decode(raw.unflatten(2, (2, 4)).permute(0, 2, 1, 3)).sample
    assert mel.shape == (1, 2, 17, 16)
    assert torch.equal(codec.decode_mel(latents), mel)


def test_attention_in_the_middle_is_read_from_the_header(altered, parts):
    def attentive(sections, tensors):
        sections["audio_vae"]["model"]["params"]["ddconfig"]["mid_block_add_attention"] = True
        for side in ("encoder", "decoder"):
            for layer in "qkv":
                tensors[f"audio_vae.{side}.mid.attn_1.{layer}.weight"] = torch.randn(8, 8, 1, 1) / 3
                tensors[f"audio_vae.{side}.mid.attn_1.{layer}.bias"] = torch.zeros(8)
            tensors[f"audio_vae.{side}.mid.attn_1.proj_out.weight"] = torch.randn(8, 8, 1, 1) / 3
            tensors[f"audio_vae.{side}.mid.attn_1.proj_out.bias"] = torch.zeros(8)
        kept.update(tensors)

    kept: dict[str, torch.Tensor] = {}
    codec = load_audio_codec(altered(attentive))
    vae = peer(kept, mid_block_add_attention=True)
    mel = codec.mel(sound(), 16000)
    assert torch.equal(codec.encoder(mel), vae.encoder(mel))
    assert not torch.equal(codec.encoder(mel), peer(parts("2.3")[1]).encoder(mel))


def test_who_encodes_does_not_read_the_vocoder(release):
    codec = load_audio_codec(release("2.3"))
    codec.encode(sound(), 16000)
    assert "vocoder" not in vars(codec)
    assert codec.sample_rate == 48000


@pytest.mark.parametrize(("generation", "rate"), [("2.0", 24000), ("2.3", 48000)])
def test_the_vocoder_is_what_diffusers_makes_of_the_same_weights(release, parts, generation, rate):
    codec, vocoder = load_audio_codec(release(generation)), VOCODERS[generation](parts(generation)[1])
    mel = codec.mel(sound(0.06), 16000)
    waveform = codec.vocode(mel)
    assert codec.sample_rate == rate
    assert waveform.shape == (1, 2, mel.shape[2] * rate // 100)
    assert torch.equal(waveform, vocoder(mel))


def test_the_first_stage_is_clamped(altered, parts):
    def loud(sections, tensors):
        tensors["vocoder.vocoder.conv_post.weight"] = 100 * tensors["vocoder.vocoder.conv_post.weight"]
        kept.update(tensors)

    kept: dict[str, torch.Tensor] = {}
    codec = load_audio_codec(altered(loud))
    mel = codec.mel(sound(0.06), 16000)
    assert codec.vocoder.vocoder(mel).abs().max() == 1
    assert torch.equal(codec.vocode(mel), second_vocoder(kept)(mel))


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize(("frames", "fps"), [(121, 24.0), (49, 25.0), (33, 29.97), (17, 60.0)])
def test_there_are_as_many_steps_as_the_picture_asks_for(codec, rate, frames, fps):
    latents = codec.encode(torch.zeros(1, 2, round(rate * frames / fps)), rate)
    assert latents.shape[2] == geometry.audio_latent_length(frames, fps)
    assert latents.dtype == torch.float32
    assert frames != 121 or latents.shape[2] == 126


def test_sound_is_as_long_as_its_mel(codec):
    assert codec.decode(torch.zeros(1, 2, 3, 4)).shape == (1, 2, 480 * (4 * 3 - 3))


def test_an_odd_number_of_samples_between_the_stages_is_no_obstacle(altered):
    def hop(sections, tensors):
        sections["vocoder"]["bwe"]["hop_length"] = 120  # 160 samples a frame are no multiple of it
        sections["vocoder"]["bwe"]["upsample_rates"] = [6, 5, 3, 2, 2]
        sections["vocoder"]["bwe"]["upsample_kernel_sizes"] = [12, 11, 3, 4, 4]
        tensors["vocoder.bwe_generator.ups.2.weight"] = tensors["vocoder.bwe_generator.ups.2.weight"][..., :3]

    codec = load_audio_codec(altered(hop))
    assert codec.vocode(torch.zeros(1, 2, 5, 16)).shape == (1, 2, 480 * 5)


def test_other_sizes_come_from_the_header(altered):
    def smaller(sections, tensors):
        sections["audio_vae"]["model"]["params"]["sampling_rate"] = 8000
        sections["audio_vae"]["preprocessing"] = {
            "stft": {"filter_length": 256, "hop_length": 100, "win_length": 200},
            "mel": {"n_mel_channels": 16, "mel_fmin": 50, "mel_fmax": 3500},
        }

    codec = load_audio_codec(altered(smaller, "2.0"))
    front = LogMel(sample_rate=8000, n_fft=256, window=200, hop=100, bins=16, lowest_hz=50.0, highest_hz=3500.0)
    assert codec.front == front
    assert torch.equal(codec.mel(sound(1, 8000), 8000), front(sound(1, 8000), 8000))
    assert codec.encode(sound(1, 8000), 8000).shape[2] == 20  # 8000 / 100 / 4
    assert codec.sample_rate == 240 * 80


def test_a_rate_that_the_header_of_a_vocoder_says_holds(altered):
    def stated(sections, tensors):
        sections["vocoder"]["output_sampling_rate"] = 22050

    assert load_audio_codec(altered(stated, "2.0")).sample_rate == 22050


def test_autocast_changes_nothing(codec):
    latents = codec.encode(sound(0.06), 16000)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(waveform=sound(0.06), sample_rate=16000), latents)
        inside = codec.decode(latents)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, codec.decode(latents))
    assert not inside.requires_grad


def test_the_name_is_that_of_the_latents(release, parts, tmp_path):
    codecs = {generation: load_audio_codec(release(generation)) for generation in ("2.0", "2.3")}
    assert all(re.fullmatch("ltx2-audio-[0-9a-f]{16}", codec.name) for codec in codecs.values())
    assert codecs["2.0"].name != codecs["2.3"].name
    other = load_audio_codec(release("2.3"), release("2.0"))
    assert (other.name, other.sample_rate) == (codecs["2.3"].name, 24000)


def test_the_name_is_the_same_from_every_form_of_the_file(codec, parts, tmp_path):
    sections, tensors = parts("2.3")
    for part in ("audio_vae", "vocoder"):
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
        write_weights(tmp_path / f"{part}.safetensors", own, {"config": json.dumps({part: sections[part]})})
    peer(tensors).bfloat16().save_pretrained(tmp_path / "pipeline" / "audio_vae")
    vocoder = second_vocoder(tensors)
    vocoder.register_to_config(final_act_fn=None)  # as published folders say
    vocoder.bfloat16().save_pretrained(tmp_path / "pipeline" / "vocoder")
    split = load_audio_codec(tmp_path / "audio_vae.safetensors", tmp_path / "vocoder.safetensors")
    for other in (split, load_audio_codec(tmp_path / "pipeline")):
        assert other.name == codec.name
        assert other.sample_rate == 48000
        assert torch.equal(
            other.decode(other.encode(sound(0.06), 16000)), codec.decode(codec.encode(sound(0.06), 16000))
        )


def test_a_name_costs_no_weights_and_needs_no_vocoder(codec, release, altered, monkeypatch):
    voiceless = altered(silent)
    monkeypatch.setattr("ltx2_train.codecs.ltx2.fill", None)
    for path in (release("2.3"), voiceless):
        assert has_audio_codec(path)
        assert audio_codec_name(path) == name_of_audio_codec(str(path)) == codec.name
    assert name_of_audio_codec("dct") == build_audio_codec("dct").name


def silent(sections, tensors):
    del sections["vocoder"]
    for key in [key for key in tensors if key.startswith("vocoder.")]:
        del tensors[key]


def test_without_a_vocoder_all_works_but_sound(codec, altered):
    voiceless = load_audio_codec(altered(silent))
    latents = voiceless.encode(sound(0.06), 16000)
    assert torch.equal(latents, codec.encode(sound(0.06), 16000))
    assert torch.equal(voiceless.decode_mel(latents), codec.decode_mel(latents))
    for act in (lambda: voiceless.sample_rate, lambda: voiceless.decode(latents)):
        with pytest.raises(CheckpointError, match=r"altered.safetensors: no vocoder in it"):
            act()


def test_a_sub_folder_of_a_pipeline_has_its_vocoder_beside_it(codec, parts, tmp_path):
    peer(parts("2.3")[1]).bfloat16().save_pretrained(tmp_path / "audio_vae")
    own = load_audio_codec(tmp_path / "audio_vae")
    with pytest.raises(CheckpointError, match="no vocoder in it"):
        own.decode(torch.zeros(1, 2, 3, 4))
    second_vocoder(parts("2.3")[1]).bfloat16().save_pretrained(tmp_path / "vocoder")
    whole = load_audio_codec(tmp_path / "audio_vae")
    assert (own.name, whole.name, whole.sample_rate) == (codec.name, codec.name, 48000)
    for path in (tmp_path, tmp_path / "audio_vae", tmp_path / "vocoder"):
        assert has_audio_codec(path)
        assert audio_codec_name(path) == codec.name


def test_a_name_of_a_codec_may_be_a_path(codec, release):
    assert build_audio_codec(str(release("2.3"))).name == codec.name
    assert build_audio_codec(str(release("2.3")), str(release("2.0"))).sample_rate == 24000
    with pytest.raises(ConfigError, match="vocoder: 'nowhere'"):
        build_audio_codec(str(release("2.3")), "nowhere")


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(1, 1, 16000), "to_stereo"),
        (torch.zeros(2, 16000), "shape"),
        (torch.full((1, 2, 16000), float("nan")), "nan"),
        (torch.full((1, 2, 16000), 32767.0), "32767"),
        (torch.zeros(1, 2, 16000, dtype=torch.int16), "int16"),
        (torch.zeros(1, 2, 300), "at least 0.0321 s"),
    ],
)
def test_what_is_no_stereo_sound_is_refused(codec, waveform, message):
    with pytest.raises(DataError, match=message):
        codec.encode(waveform, 16000)


def test_mels_and_latents_of_other_sizes_are_refused(codec):
    with pytest.raises(DataError, match=r"needs \(B, 2, T, 16\)"):
        codec.vocode(torch.zeros(1, 2, 5, 64))
    with pytest.raises(DataError, match=r"needs \(B, 2, any, 4\)"):
        codec.decode_mel(torch.zeros(1, 8, 5, 16))


# --- headers ---


def test_the_released_headers_give_the_known_arguments():
    section = Section("config.audio_vae", full_sections("2.3")["audio_vae"])
    assert ltx2_config.log_mel(section) == LogMel()
    arguments = ltx2_config.audio_vae(section)
    assert (arguments["attn_resolutions"], arguments["mid_block_add_attention"]) == (None, False)
    vocoder = ltx2_config.bandwidth_vocoder(Section("config.vocoder", full_sections("2.3")["vocoder"]), 128, 128)
    assert (vocoder["final_act_fn"], vocoder["bwe_final_act_fn"], vocoder["final_bias"]) == ("clamp", None, False)
    silent = full_sections("2.3")["vocoder"]
    del silent["bwe"]["apply_final_activation"]
    assert ltx2_config.bandwidth_vocoder(Section("config.vocoder", silent), 128, 128) == vocoder
    first = ltx2_config.vocoder(Section("config.vocoder", full_sections("2.0")["vocoder"]), 128)
    assert (first["final_act_fn"], first["final_bias"], first["act_fn"]) == ("tanh", True, "leaky_relu")


def test_a_header_without_a_word_on_attention_means_attention():
    section = full_sections("2.3")["audio_vae"]
    for key in ("attn_resolutions", "mid_block_add_attention"):
        del section["model"]["params"]["ddconfig"][key]
    arguments = ltx2_config.audio_vae(Section("config.audio_vae", section))
    assert (arguments["attn_resolutions"], arguments["mid_block_add_attention"]) == ((8, 16, 32), True)


def no_vocoder(sections, tensors):
    del sections["vocoder"]


def missing(sections, tensors):
    del tensors["vocoder.bwe_generator.conv_pre.weight"]


def surplus(sections, tensors):
    tensors["audio_vae.encoder.mid.attn_1.q.weight"] = torch.zeros(8, 8, 1, 1)


def misshapen(sections, tensors):
    tensors["audio_vae.decoder.conv_in.conv.weight"] = torch.zeros(8, 4, 3, 3)


def no_statistics(sections, tensors):
    del tensors["audio_vae.per_channel_statistics.mean-of-means"]


def other_bins(sections, tensors):
    tensors["vocoder.vocoder.conv_pre.weight"] = torch.zeros(128, 128, 7)


def mono(sections, tensors):
    sections["vocoder"]["vocoder"]["stereo"] = False


def other_activation(sections, tensors):
    sections["vocoder"]["vocoder"]["activation"] = "snake"


def deeper(sections, tensors):
    sections["audio_vae"]["model"]["params"]["ddconfig"]["ch_mult"] = [1, 1, 1, 1]


def no_width(sections, tensors):
    del sections["audio_vae"]["model"]["params"]["ddconfig"]["ch"]


def flat(sections, tensors):
    tensors["vocoder.vocoder.conv_pre.weight"] = torch.zeros(3)


def whole_numbers(sections, tensors):
    tensors["vocoder.vocoder.conv_post.weight"] = tensors["vocoder.vocoder.conv_post.weight"].int()


def truths(sections, tensors):
    key = "audio_vae.per_channel_statistics.std-of-means"
    tensors[key] = tensors[key].bool()


def first_rate(value):
    def change(sections, tensors):
        sections["vocoder"]["vocoder"]["upsample_rates"][0] = value

    return change


def mel_hop(value):
    def change(sections, tensors):
        sections["audio_vae"]["preprocessing"]["stft"]["hop_length"] = value

    return change


def initial_channels(sections, tensors):
    sections["vocoder"]["vocoder"]["upsample_initial_channel"] = "x"


def residual_blocks(sections, tensors):
    sections["audio_vae"]["model"]["params"]["ddconfig"]["num_res_blocks"] = 10**7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flat, r"1 missing: vocoder\.conv_pre\.weight, a tensor of 3 dims"),
        (whole_numbers, r"1 weights are .* not read: vocoder\.conv_post\.weight is torch.int32"),
        (truths, r"1 weights are .* not read: per_channel_statistics\.std-of-means is torch.bool"),
        (first_rate(-1), r"upsample_factors=\[-1, .*; supported are finite numbers, whole ones from 1 to 1,000,000"),
        (first_rate(0), r"upsample_factors=\[0, "),
        (first_rate(10**7), r"upsample_factors=\[10000000, "),
        (first_rate(999), r"upsample_factors=\[999, .*beyond the kernels"),
        (first_rate("x"), r"config\.vocoder: no codec can be built from it \(TypeError"),
        (mel_hop(0), r"hop=0; supported are"),
        (mel_hop("x"), r"no codec can be built from it"),
        (initial_channels, r"config\.vocoder: no codec can be built from it \(TypeError"),
        (residual_blocks, r"num_res_blocks=10000000; supported are .* layers to 64"),
        (no_vocoder, r"no `config\.vocoder`"),
        (missing, r"missing: bwe_generator\.conv_pre\.weight"),
        (surplus, r"1 surplus: encoder\.mid\.attn_1\.q\.weight"),
        (misshapen, r"decoder\.conv_in\.conv\.weight \[8, 4, 3, 3\] instead of"),
        (no_statistics, "mean-of-means is missing"),
        (other_bins, "made for 64 mel bins, the audio VAE has 16"),
        (mono, "stereo is False"),
        (other_activation, "activation is 'snake'"),
        (deeper, r"ch_mult is \[1, 1, 1, 1\]"),
        (no_width, r"ddconfig\.ch is missing"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(altered, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load_audio_codec(altered(change))
    assert "altered.safetensors" in str(error.value)
