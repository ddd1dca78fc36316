"""Hidden states to contexts against diffusers' text connectors, and a model that is handed stored contexts."""

from dataclasses import replace

import pytest
import torch

from ltx2_train.errors import ConfigError
from ltx2_train.model import Connectors, ModelConfig, TextConditioned, build_model, initial_weights
from ltx2_train.model.connector import ConnectorBlock
from ltx2_train.model.weights import load_connectors
from ltx2_train.testing.released import GENERATIONS, TEXT_STATES, TEXT_WIDTH, tiny_config, write_release
from ltx2_train.text import load_feature_extractor
from tests.peers.diffusers_connectors import peer_of
from tests.peers.diffusers_transformer import random_inputs


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
