"""Hidden states to contexts against diffusers' text connectors, and a model that is handed stored contexts."""

import re
from dataclasses import replace

import pytest
import torch

from ltx2_train.errors import ConfigError
from ltx2_train.model import Connectors, ModelConfig, TextConditioned, build_model, initial_weights
from ltx2_train.model.connector import ConnectorBlock
from ltx2_train.model.weights import load_connectors
from ltx2_train.testing.released import GENERATIONS, TEXT_STATES, TEXT_WIDTH, tiny_config, write_release
from ltx2_train.text import load_feature_extractor
from ltx2_train.weightfile import open_weights
from tests.peers.diffusers_transformer import random_inputs

KEY_MAP = [  # released to diffusers
    (r"^model\.diffusion_model\.(video|audio)_embeddings_connector\.", r"\1_connector."),
    (r"\.transformer_1d_blocks\.", ".transformer_blocks."),
    (r"\.([qk])_norm\.", r".norm_\1."),
    (r"^text_embedding_projection\.aggregate_embed\.", "text_proj_in."),
    (r"^text_embedding_projection\.(video|audio)_aggregate_embed\.", r"\1_text_proj_in."),
]


def peer_key(key):
    for pattern, replacement in KEY_MAP:
        key = re.sub(pattern, replacement, key)
    return key


def peer_of(files, config):
    """diffusers' text connectors of a release, in fp32, strictly loaded."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    per_stream = config.caption_proj_before_connector
    sizes = {
        "num_attention_heads": (config.connector_num_attention_heads, config.audio_connector_num_attention_heads),
        "attention_head_dim": (config.connector_attention_head_dim, config.audio_connector_attention_head_dim),
        "num_layers": (config.connector_num_layers, None),
    }
    arguments = {f"video_connector_{name}": video for name, (video, _) in sizes.items()}
    arguments |= {f"audio_connector_{name}": audio or video for name, (video, audio) in sizes.items()}
    arguments |= {f"{stream}_gated_attn": config.connector_apply_gated_attention for stream in ("video", "audio")}
    peer = LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=TEXT_STATES,
        rope_type="split",
        per_modality_projections=per_stream,
        proj_bias=per_stream,
        video_hidden_dim=config.video_connector_width,
        audio_hidden_dim=config.audio_connector_width,
        **arguments,
    )
    stored = {key: t for file in files for key, t in open_weights(file).items()}
    own = {
        k: t.read().float()
        for k, t in stored.items()
        if "_connector." in k or k.startswith("text_embedding_projection.")
    }
    peer.load_state_dict({peer_key(key): tensor for key, tensor in own.items()}, strict=True)
    return peer.eval()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_contexts_are_those_of_diffusers_from_the_hidden_states_on(tmp_path, generation):
    release = write_release(tmp_path, generation, parts=("transformer", "text_projection"))
    peer = peer_of({release.transformer, release.text_projection}, tiny_config(generation))
    torch.manual_seed(0)
    states, mask = torch.randn(2, 256, TEXT_WIDTH, TEXT_STATES), torch.ones(2, 256, dtype=torch.long)
    mask[0, : 256 - 37] = mask[1, : 256 - 200] = 0
    features = load_feature_extractor(release.text_projection, dtype=torch.float32)(states, mask)
    connectors = load_connectors(release.transformer, dtype=torch.float32)
    with torch.no_grad():
        *theirs, their_mask = peer(states, mask, padding_side="left")
        found = connectors(*features, mask)
    assert bool(their_mask.all())
    for ours, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)


# --- stored contexts ---


@pytest.fixture
def model():
    config = ModelConfig(name="tiny", train_connectors=False)
    model = build_model(config)
    for name, tensor in initial_weights(model, config, 0):
        model.get_parameter(name).data.copy_(tensor)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def inputs(model):
    return random_inputs(model.config, 2, (3, 2, 2), 5, 4)


def with_contexts(model: TextConditioned, inputs):
    """The inputs with what the model's connectors make of their features."""
    assert isinstance(model.connectors, Connectors)
    texts = [modality.context for modality in inputs]
    with torch.no_grad():
        contexts = model.connectors(*texts, inputs[0].context_mask, model.text_tokens)
    return [replace(m, context=context, context_mask=None) for m, context in zip(inputs, contexts, strict=True)]


def test_a_model_without_connectors_is_the_same_on_stored_contexts(model, inputs):
    bare = TextConditioned(model.transformer, None, model.text_tokens)
    with torch.no_grad():
        expected, found = model(*inputs), bare(*with_contexts(model, inputs))
    assert torch.equal(found.video, expected.video)
    assert torch.equal(found.audio, expected.audio)


def test_a_model_without_connectors_has_none_in_its_weights_and_units(model):
    bare = TextConditioned(model.transformer, None, model.text_tokens)
    assert all(name.startswith("transformer.") for name, _ in bare.named_parameters())
    assert bare.shard_units() == model.transformer.shard_units()
    assert any(isinstance(unit, ConnectorBlock) for unit in model.shard_units())


def test_features_are_refused_where_contexts_are_needed(model, inputs):
    bare = TextConditioned(model.transformer, None, model.text_tokens)
    with pytest.raises(ConfigError, match=r"needs contexts of 16 rows; it was given 4 rows\. .*--text-cache context"):
        bare(*inputs)


def test_the_rows_of_the_padding_are_attended_where_they_are_a_context(model, inputs):
    bare = TextConditioned(model.transformer, None, model.text_tokens)
    video, audio = with_contexts(model, inputs)
    mask = torch.zeros(2, model.text_tokens)
    mask[:, :3] = 1
    with torch.no_grad():
        whole, masked = bare(video, audio), bare(replace(video, context_mask=mask), audio)
    assert torch.equal(whole.video, masked.video)
