"""Names and configurations are those of diffusers' classes: they load strictly, at every size, and compute the same."""

import inspect
import json
from dataclasses import asdict, replace

import pytest
import torch

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.model import Connectors, Transformer, TransformerConfig, named_config
from ltx2_train.model.diffusers_names import (
    config_from_diffusers,
    connectors_from_diffusers,
    connectors_to_diffusers,
    diffusers_config,
    diffusers_connectors_config,
    from_diffusers,
    text_states,
    to_diffusers,
)
from ltx2_train.model.weights import load_connectors, load_transformer
from ltx2_train.testing.released import (
    GENERATIONS,
    TEXT_STATES,
    text_projection_tensors,
    tiny_config,
    transformer_tensors,
    write_release,
)
from ltx2_train.weightfile import write_weights
from tests.peers.diffusers_transformer import peer_arguments, random_inputs

FULL = ("ltx2_19b", "ltx2_3_22b", "ltx2_5_22b")
PROJECTIONS = "text_embedding_projection."


def on_meta(build, *arguments, **named):
    with torch.device("meta"):
        return build(*arguments, **named)


def peer_transformer(config: TransformerConfig):
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel.from_config(json.loads(json.dumps(diffusers_config(config))))


def peer_connectors(config: TransformerConfig, text_states: int):
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    return LTX2TextConnectors.from_config(json.loads(json.dumps(diffusers_connectors_config(config, text_states))))


def shapes(module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_and_shapes_are_those_of_the_peers(name):
    config = named_config(name)
    ours = shapes(on_meta(Transformer, config))
    assert {to_diffusers(n): s for n, s in ours.items()} == shapes(on_meta(peer_transformer, config))
    assert all(from_diffusers(to_diffusers(n)) == n for n in ours)
    connectors = shapes(on_meta(Connectors, config))
    theirs = shapes(on_meta(peer_connectors, config, 49))
    projections = {n for n in theirs if "text_proj_in" in n}
    assert {connectors_to_diffusers(n): s for n, s in connectors.items()} == {
        n: s for n, s in theirs.items() if n not in projections
    }
    assert all(connectors_from_diffusers(connectors_to_diffusers(n)) == n for n in connectors)
    official = {connectors_from_diffusers(n) for n in projections}
    assert all(n.startswith(PROJECTIONS) and connectors_to_diffusers(n) in projections for n in official)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_text_projections_fit_the_peer(generation):
    config = tiny_config(generation)
    theirs = shapes(peer_connectors(config, TEXT_STATES))
    ours = {connectors_to_diffusers(n): t.shape for n, t in text_projection_tensors(generation).items()}
    assert ours == {n: s for n, s in theirs.items() if "text_proj_in" in n}


def test_every_argument_is_one_of_the_classes_and_none_is_left_to_a_default():
    config = tiny_config("2.5")
    peer, connectors = peer_transformer(config), peer_connectors(config, TEXT_STATES)
    placing = {"vae_scale_factors", "audio_scale_factor", "audio_sampling_rate", "audio_hop_length", "causal_offset"}
    for module, written, unwritten in (
        (peer, diffusers_config(config), placing),
        (connectors, diffusers_connectors_config(config), set()),
    ):
        arguments = set(inspect.signature(type(module).__init__).parameters) - {"self"}
        assert arguments - unwritten == {name for name in written if not name.startswith("_")}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_configurations_return_from_diffusers(generation):
    config = tiny_config(generation)
    back = config_from_diffusers(diffusers_config(config), diffusers_connectors_config(config))
    resolved = {
        "audio_connector_num_attention_heads": config.audio_connector_heads,
        "audio_connector_attention_head_dim": config.audio_connector_width // config.audio_connector_heads,
        "audio_connector_num_layers": config.audio_connector_layers,
    }
    assert asdict(back) == asdict(config) | resolved


def test_absent_arguments_mean_what_they_mean_to_diffusers():
    from diffusers import LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    bare = config_from_diffusers({}, {})
    assert bare.rope_type == "interleaved"
    for theirs in (LTX2VideoTransformer3DModel, LTX2TextConnectors):
        written = diffusers_config(bare) if theirs is LTX2VideoTransformer3DModel else diffusers_connectors_config(bare)
        defaults = {n: p.default for n, p in inspect.signature(theirs.__init__).parameters.items() if n in written}
        differing = {n for n, default in defaults.items() if written[n] != default}
        assert differing <= {"perturbed_attn"}


@pytest.mark.parametrize(
    ("transformer", "connectors", "message"),
    [
        ({"patch_size": 2, "qk_norm": "layer"}, {}, r"patch_size=2 \(supported: 1\); qk_norm='layer'"),
        ({"mixture": 3}, None, r"mixture=3 \(unknown\)"),
        ({"gated_attn": True}, None, "gated_attn=True and audio_gated_attn=False"),
        ({"rope_type": "split"}, {}, "do not belong together: rope_type='interleaved' and 'split'"),
        ({"rope_type": "split"}, {"rope_type": "spiral"}, "do not belong together"),
        ({"cross_attention_dim": 7}, None, "cross_attention_dim=7"),
        (None, {"causal_temporal_positioning": True}, "causal_temporal_positioning=True"),
    ],
)
def test_what_this_program_has_no_code_for_is_named(transformer, connectors, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_diffusers(transformer, connectors)


def test_caption_channels_are_held_against_each_other_only_where_the_transformer_reads_them():
    config = tiny_config("2.3")
    transformer = {**diffusers_config(config), "caption_channels": 3840}
    connectors = {**diffusers_connectors_config(config), "caption_channels": 36}
    assert config_from_diffusers(transformer, connectors).caption_channels == 36
    old = tiny_config("2.0")
    with pytest.raises(CheckpointError, match="caption_channels=36 and 3840"):
        config_from_diffusers({**diffusers_config(old), "caption_channels": 3840}, diffusers_connectors_config(old))


def test_hidden_states_are_counted_by_the_width_that_diffusers_takes_for_granted():
    config = replace(tiny_config("2.3"), caption_channels=None)
    assert text_states(config, 3840 * 49) == 49
    with pytest.raises(ConfigError, match="no whole number of hidden states"):
        text_states(config, 36 * 4)


def test_a_model_without_exchange_is_refused_as_diffusers_has_none():
    with pytest.raises(ConfigError, match="use_audio_video_cross_attention=False"):
        diffusers_config(tiny_config("2.5", use_audio_video_cross_attention=False))


def test_connectors_that_diffusers_cannot_express_are_refused():
    with pytest.raises(ConfigError, match="connector_ff_bias=False"):
        diffusers_connectors_config(tiny_config("2.5", connector_ff_bias=False))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("given", ["pipeline", "component"])
@torch.no_grad()
def test_a_folder_saved_by_diffusers_loads_and_computes_the_same(tmp_path, generation, given):
    config = tiny_config(generation)
    tensors = {k.removeprefix("model.diffusion_model."): t.float() for k, t in transformer_tensors(config).items()}
    peers = {"transformer": peer_transformer(config), "connectors": peer_connectors(config, TEXT_STATES)}
    own, text = ({n: t for n, t in tensors.items() if ("_connector." in n) is c} for c in (False, True))
    text |= {n: t.float() for n, t in text_projection_tensors(generation).items()}
    peers["transformer"].load_state_dict({to_diffusers(n): t for n, t in own.items()}, strict=True)
    peers["connectors"].load_state_dict({connectors_to_diffusers(n): t for n, t in text.items()}, strict=True)
    for name, peer in peers.items():
        peer.save_pretrained(tmp_path / name, max_shard_size="100KB")
    (tmp_path / "model_index.json").write_text("{}")
    paths = {name: tmp_path if given == "pipeline" else tmp_path / name for name in peers}

    model, connectors = load_transformer(paths["transformer"]), load_connectors(paths["connectors"])
    loaded = {**model.state_dict(), **connectors.state_dict()}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())
    video, audio = random_inputs(model.config, batch=2, grid=(2, 2, 2), steps=3, text=4)
    outputs = model(video, audio), peers["transformer"](**peer_arguments(video, audio), return_dict=False)
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert_same_contexts(connectors, peers["connectors"], config)


def assert_same_contexts(connectors: Connectors, peer, config: TransformerConfig) -> None:
    """Full rows only: a peer's connector takes features and an additive mask."""
    video, audio = (torch.randn(2, 128, w) for w in (config.video_connector_width, config.audio_connector_width))
    ours = connectors(video, audio, torch.ones(2, 128))
    theirs = (
        m(x, torch.zeros(2, 1, 1, 128))[0] for m, x in ((peer.video_connector, video), (peer.audio_connector, audio))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_one_component_of_a_folder_is_not_enough_for_the_other(tmp_path):
    release = write_release(tmp_path, "2.3", parts=("transformer",))
    config, only = load_transformer(release.transformer).config, tmp_path / "transformer"
    model = load_transformer(release.transformer)
    write_weights(
        only / "diffusion_pytorch_model.safetensors", {to_diffusers(n): t for n, t in model.state_dict().items()}, {}
    )
    (only / "config.json").write_text(json.dumps(diffusers_config(config)))
    assert load_transformer(only).config.apply_gated_attention
    with pytest.raises(CheckpointError, match="no text connectors .* Give"):
        load_connectors(only)
