"""Adapters start as nothing, train alone and leave the base as it was."""

import pytest
import torch

from ltx2_train.errors import ConfigError
from ltx2_train.model import ModelConfig, build_model, initial_weights
from ltx2_train.model.lora import LoraConfig, add_lora, target_modules
from tests.peers.diffusers_transformer import random_inputs

CONFIG = ModelConfig(name="tiny")


def build(lora: LoraConfig | None):
    model = build_model(CONFIG)
    if lora is not None:
        model = add_lora(model, lora)
    with torch.no_grad():
        for name, tensor in initial_weights(model, CONFIG, seed=0):
            parameter = model.get_parameter(name)
            parameter.copy_(tensor if "proj_out" not in name else torch.full_like(tensor, 0.01))
    return model


def outputs(model):
    video, audio = random_inputs(model.config, 2, (3, 2, 2), 5, 4)
    return model(video, audio)


def test_new_adapters_change_nothing_and_the_base_starts_from_the_same_numbers():
    for with_adapter, without in zip(outputs(build(LoraConfig(rank=4))), outputs(build(None)), strict=True):
        torch.testing.assert_close(with_adapter, without)


def test_only_adapters_train_and_all_of_them_do():
    model = build(LoraConfig(rank=4, alpha=8))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(v.square().mean() for v in outputs(model)).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == (not torch.equal(parameter, before[name])), name


def test_default_targets_are_all_attentions_and_feed_forwards():
    names = target_modules(build_model(CONFIG), LoraConfig())
    assert len(names) == 2 * (6 * 4 + 2 * 2)


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(ConfigError, match="matches no linear layer"):
        target_modules(build_model(CONFIG), LoraConfig(targets=["blocks.*"]))
