"""The feature extractors against diffusers' text connectors fed by hand-mapped weights, and the files they come from."""

import json
import re

import pytest
import torch

from ltx2_train.errors import CheckpointError
from ltx2_train.testing.released import GENERATIONS, text_projection_tensors
from ltx2_train.text import has_projection, load_feature_extractor, projection_name
from ltx2_train.text.features import PREFIX, V2_SETTINGS, open_projection
from ltx2_train.weightfile import write_weights

WIDTH, STATES = 36, 4
PEER_NAMES = {
    "aggregate_embed": "text_proj_in",
    "video_aggregate_embed": "video_text_proj_in",
    "audio_aggregate_embed": "audio_text_proj_in",
}


def tensors_of(generation, dtype=torch.float32):
    tensors = text_projection_tensors(generation, text_width=WIDTH, text_states=STATES)
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def header(generation, **fields):
    section = {"caption_channels": WIDTH} | ({} if generation == "2.0" else V2_SETTINGS) | fields
    return {"config": json.dumps({"transformer": section}), "model_version": f"{generation}.0"}


def write_file(path, generation, metadata=None, **changes):
    tensors = tensors_of(generation) | changes
    write_weights(path, {k: t for k, t in tensors.items() if t is not None}, metadata or header(generation))
    return path


def peer_of(tensors):
    """diffusers' module with these projections; its connectors are not run."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    own = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    per_stream = "video_aggregate_embed.weight" in own
    names = ("num_layers", "num_learnable_registers", "num_attention_heads", "attention_head_dim")
    sizes = {f"{s}_connector_{name}": 1 for s in ("video", "audio") for name in names}
    if per_stream:
        sizes |= {f"{s}_hidden_dim": len(own[f"{s}_aggregate_embed.weight"]) for s in ("video", "audio")}
    peer = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=STATES,
        per_modality_projections=per_stream,
        proj_bias=per_stream,
        **sizes,
    )
    named = [(*name.split("."), tensor) for name, tensor in own.items()]
    found = peer.load_state_dict({f"{PEER_NAMES[m]}.{kind}": t for m, kind, t in named}, strict=False)
    assert not found.unexpected_keys
    assert all("_connector." in key for key in found.missing_keys)
    return peer


def peer_features(peer, states, mask):
    """What diffusers' connectors are handed."""
    seen = []
    for connector in (peer.video_connector, peer.audio_connector):
        connector.forward = lambda features, attention_mask: (seen.append(features), (features, attention_mask))[1]
    peer(states, mask, padding_side="left")
    return seen


def states_and_mask(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(2, 9, WIDTH, STATES, generator=g) * torch.tensor([0.1, 1.0, 30.0, 4.0]) + 0.5
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :6] = 0
    return states.to(dtype), mask


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_those_of_diffusers(tmp_path, generation, dtype):
    path = write_file(tmp_path / "w.safetensors", generation)
    states, mask = states_and_mask(dtype)
    found = load_feature_extractor(path, dtype=dtype)(states, mask)
    expected = peer_features(peer_of(tensors_of(generation)).to(dtype), states, mask)
    tolerance = 2e-6 if dtype == torch.float32 else 0.016  # one step of bf16 at the largest values
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=tolerance, rtol=0)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_stands_in_the_padding_and_where_it_stands_changes_nothing(tmp_path, generation):
    extract = load_feature_extractor(write_file(tmp_path / "w.safetensors", generation))
    states, mask = states_and_mask()
    other = states.masked_fill(~mask.bool()[..., None, None], 1e4)
    right = torch.cat([states[:1, 6:], other[:1, :6]], dim=1)
    alone = extract(states[:1, 6:], torch.ones(1, 3))
    left, turned = extract(other[:1], mask[:1]), extract(right, mask[:1].flip(1))
    for i in range(2):
        torch.testing.assert_close(left[i][:, 6:], alone[i], atol=2e-6, rtol=0)
        torch.testing.assert_close(turned[i][:, :3], alone[i], atol=2e-6, rtol=0)


def test_layers_one_by_one_and_stacked_are_the_same(tmp_path):
    extract = load_feature_extractor(write_file(tmp_path / "w.safetensors", "2.3"))
    states, mask = states_and_mask()
    for ours, other in zip(extract(states, mask), extract(states.unbind(-1), mask), strict=True):
        assert torch.equal(ours, other)


def test_both_streams_of_2_0_share_one_tensor(tmp_path):
    video, audio = load_feature_extractor(write_file(tmp_path / "w.safetensors", "2.0"))(*states_and_mask())
    assert video is audio


def test_fp32_states_on_bf16_weights_are_computed_in_fp32(tmp_path):
    tensors = tensors_of("2.3", torch.bfloat16)
    write_weights(tmp_path / "w.safetensors", tensors, header("2.3"))
    states, mask = states_and_mask()
    found = load_feature_extractor(tmp_path / "w.safetensors")(states, mask)
    expected = peer_features(peer_of({k: t.float() for k, t in tensors.items()}), states, mask)
    torch.testing.assert_close(found[0][mask.bool()], expected[0][mask.bool()], atol=2e-6, rtol=0)


# --- files ---


def write_component(folder, kind):
    write_weights(folder / "model.safetensors", {"weight": torch.zeros(2, 2)}, {})
    (folder / "config.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def test_a_projection_is_found_and_named_in_every_form_of_weights(tmp_path):
    file = write_file(tmp_path / "folder" / "w.safetensors", "2.3")
    peer_of(tensors_of("2.3")).save_pretrained(tmp_path / "pipeline" / "connectors")
    transformer = write_component(tmp_path / "pipeline" / "transformer", "LTX2VideoTransformer3DModel")
    name = projection_name(file)
    assert re.fullmatch("features-v2:[0-9a-f]{12}", name)
    for place in (file, file.parent, transformer.parent, transformer, transformer.parent / "connectors"):
        assert has_projection(place), place
        assert projection_name(place) == name


def test_weights_without_a_projection_have_none(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"vae.x": torch.ones(3)}, {})
    transformer = write_component(tmp_path / "pipeline" / "transformer", "LTX2VideoTransformer3DModel")
    for place in (tmp_path / "w.safetensors", transformer, transformer.parent):
        assert not has_projection(place), place
    with pytest.raises(CheckpointError, match=r"transformer/config.json: not the configuration of text connectors"):
        projection_name(transformer)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_diffusers_folder_holds_the_same_projection(tmp_path, generation):
    official = open_projection(write_file(tmp_path / "w.safetensors", generation))
    peer_of(tensors_of(generation)).save_pretrained(tmp_path / "pipeline" / "connectors")
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "connectors"):
        folder = open_projection(place)
        assert (folder.version, folder.widths, folder.caption_channels) == (
            official.version,
            official.widths,
            official.caption_channels,
        )
        assert folder.fingerprint == official.fingerprint
    states, mask = states_and_mask()
    for ours, other in zip(official.read()(states, mask), folder.read()(states, mask), strict=True):
        assert torch.equal(ours, other)


def test_a_split_text_file_without_a_transformer_section_is_known_by_its_keys(tmp_path):
    for generation, version in (("2.0", 1), ("2.5", 2)):
        path = write_file(tmp_path / f"{generation}.safetensors", generation, {"model_version": generation})
        assert open_projection(path).version == version


def test_the_fingerprint_is_that_of_the_projection_alone(tmp_path):
    first = open_projection(write_file(tmp_path / "a.safetensors", "2.3"))
    beside = open_projection(write_file(tmp_path / "b.safetensors", "2.3", **{"vae.x": torch.ones(3)}))
    key = f"{PREFIX}audio_aggregate_embed.bias"
    other = open_projection(write_file(tmp_path / "c.safetensors", "2.3", **{key: torch.ones(20)}))
    assert first.fingerprint == beside.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "fields",
    [
        {"caption_proj_before_connector": False},
        {"caption_projection_first_linear": True},
        {"caption_proj_input_norm": None},
    ],
)
def test_settings_between_the_extractors_are_refused_with_all_of_them(tmp_path, fields):
    path = write_file(tmp_path / "w.safetensors", "2.3", header("2.3", **fields))
    with pytest.raises(
        CheckpointError, match=r"w\.safetensors: config\.transformer has caption_proj_before_connector=.*"
    ):
        open_projection(path)


def test_one_setting_of_four_is_refused(tmp_path):
    path = write_file(tmp_path / "w.safetensors", "2.3", header("2.0", caption_proj_before_connector=True))
    with pytest.raises(CheckpointError, match="caption_projection_first_linear=absent"):
        open_projection(path)


@pytest.mark.parametrize(
    ("generation", "changes", "message"),
    [
        ("2.3", {f"{PREFIX}audio_aggregate_embed.bias": None}, "missing .*audio_aggregate_embed.bias"),
        (
            "2.3",
            {f"{PREFIX}aggregate_embed.weight": torch.ones(2, 2)},
            "surplus .*embedding_projection.aggregate_embed",
        ),
        ("2.3", {f"{PREFIX}video_aggregate_embed.bias": torch.ones(3)}, r"is \[3\], needs \[40\]"),
        ("2.3", {f"{PREFIX}video_aggregate_embed.weight": torch.ones(40, 72)}, "different widths"),
        (
            "2.0",
            {f"{PREFIX}aggregate_embed.weight": torch.ones(36, 145)},
            "takes 145 numbers per token, .*caption_channels=36",
        ),
        ("2.0", {f"{PREFIX}aggregate_embed.weight": None, "vae.x": torch.ones(1)}, "no text_embedding_projection"),
    ],
)
def test_a_projection_that_is_not_whole_is_refused_by_name(tmp_path, generation, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_projection(write_file(tmp_path / "w.safetensors", generation, **changes))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_weights_that_are_not_floating_point_are_refused_by_name(tmp_path, dtype):
    key = f"{PREFIX}video_aggregate_embed.bias"
    path = write_file(tmp_path / "w.safetensors", "2.3", **{key: torch.ones(40).to(dtype)})
    with pytest.raises(CheckpointError, match=f"w.safetensors: 1 weights are .* not read: {key} is {dtype}"):
        load_feature_extractor(path)


@pytest.mark.parametrize("channels", ["x", 0, -36, 36.0, [36], float("nan"), 37])
def test_a_width_of_hidden_states_that_cannot_be_is_refused(tmp_path, channels):
    path = write_file(tmp_path / "w.safetensors", "2.3", header("2.3", caption_channels=channels))
    with pytest.raises(CheckpointError, match="no whole number of hidden states of caption_channels="):
        open_projection(path)


def test_weights_with_nan_are_refused_by_name(tmp_path):
    key = f"{PREFIX}video_aggregate_embed.bias"
    path = write_file(tmp_path / "w.safetensors", "2.3", **{key: torch.full((40,), torch.nan)})
    with pytest.raises(CheckpointError, match=r"w\.safetensors: .*video_aggregate_embed.bias"):
        load_feature_extractor(path)


def test_fp8_weights_are_dequantised_with_a_notice(tmp_path, caplog):
    key = f"{PREFIX}audio_aggregate_embed.weight"
    weight = tensors_of("2.3")[key]
    scaled = {key: (weight / 0.5).to(torch.float8_e4m3fn), f"{key}_scale": torch.tensor(0.5)}
    extract = load_feature_extractor(write_file(tmp_path / "w.safetensors", "2.3", **scaled))
    assert "1 of the text projection's tensors are FP8" in caplog.text
    torch.testing.assert_close(extract.audio_aggregate_embed.weight.float(), weight, atol=0.02, rtol=0.07)


def test_states_of_another_language_model_are_refused(tmp_path):
    extract = load_feature_extractor(write_file(tmp_path / "w.safetensors", "2.3"))
    with pytest.raises(CheckpointError, match=r"takes 144 numbers per token, .* 5 hidden states of 36 = 180"):
        extract(torch.zeros(1, 2, 36, 5), torch.ones(1, 2))
