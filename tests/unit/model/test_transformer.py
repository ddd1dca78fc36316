"""What must hold of the model whatever its weights are."""

from dataclasses import fields, replace

import pytest
import torch

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.model import ModelConfig, Transformer, TransformerConfig, build_model, initial_weights, named_config
from ltx2_train.model.config import CONFIGURATIONS
from tests.golden.transformer_cases import inputs, tiny_header, tiny_model
from tests.peers.diffusers_transformer import random_inputs


def assert_equal(first, second, atol: float = 1e-5):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@torch.no_grad()
def test_compact_timesteps_equal_per_token_timesteps():
    """Shared runs, runs that differ between samples, and one value a sample."""
    model = tiny_model("2.5")
    video, audio, _ = inputs("2.5", "joint")
    expected = model(video, audio)
    values = torch.tensor([[0.0, 0.35, 0.7], [0.0, 0.2, 0.4]])
    index = torch.tensor([0] * 4 + [1] * 2 + [2] * 6)
    shared = replace(video, timesteps=values, timestep_index=index.expand(2, -1).contiguous())
    assert_equal(model(shared, audio), expected)
    own = torch.stack([index, 2 - index])
    swapped = replace(video, timesteps=torch.stack([values[0], values[1].flip(0)]), timestep_index=own)
    assert_equal(model(swapped, audio), expected)
    flat = replace(video, timesteps=video.sigma[:, None])
    full = replace(video, timesteps=video.sigma[:, None].expand(-1, 12).contiguous())
    assert_equal(model(flat, audio), model(full, audio))


def test_compact_timesteps_give_the_gradients_of_per_token_timesteps():
    model = tiny_model("2.5")
    video, audio, _ = inputs("2.5", "joint")
    values = torch.tensor([[0.0, 0.35, 0.7], [0.0, 0.2, 0.4]])
    index = torch.tensor([[0] * 4 + [1] * 2 + [2] * 6]).expand(2, -1).contiguous()
    gradients = []
    for given in (video, replace(video, timesteps=values, timestep_index=index)):
        model.zero_grad()
        sum(v.square().mean() for v in model(given, audio)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch_mates():
    model = tiny_model("2.3")
    video, audio, _ = inputs("2.3", "joint")
    both = model(video, audio)

    def only(m, i):
        tensors = ("latent", "sigma", "timesteps", "context", "keyframes_mask", "positions")
        return replace(m, **{n: getattr(m, n)[i : i + 1] for n in tensors if getattr(m, n) is not None})

    for i in range(2):
        alone = model(only(video, i), only(audio, i))
        assert_equal(alone, [v[i : i + 1] for v in both])


@torch.no_grad()
def test_perturbing_samples_equals_running_them_apart():
    """Keep masks of a mixed batch and operations left out for a whole batch mean the same."""
    model = tiny_model("2.3")
    video, audio, _ = inputs("2.3", "joint")
    for kind in ("SKIP_VIDEO_SELF_ATTN", "SKIP_AUDIO_SELF_ATTN", "SKIP_A2V", "SKIP_V2A"):
        whole = model(video, audio, [[(kind, [0])]] * 2)
        mixed = model(video, audio, [[(kind, [0])], []])
        assert_equal([v[:1] for v in mixed], [v[:1] for v in whole])
        assert_equal([v[1:] for v in mixed], [v[1:] for v in model(video, audio)])


@torch.no_grad()
def test_isolated_streams_equal_single_stream_models():
    model = tiny_model("2.3")
    video, audio, _ = inputs("2.3", "joint")
    isolated = model(video, audio, [[("SKIP_A2V", None), ("SKIP_V2A", None)]] * 2)
    assert_equal([isolated.video], [model(video, None).video])
    assert_equal([isolated.audio], [model(None, audio).audio])
    video_only, audio_only = Transformer(model.config, audio=False), Transformer(model.config, video=False)
    for part in (video_only, audio_only):
        part.load_state_dict({n: model.state_dict()[n] for n in part.state_dict()})
    assert_equal([video_only(video, None).video, audio_only(None, audio).audio], isolated)


@torch.no_grad()
def test_a_model_without_exchange_is_two_models_that_know_nothing_of_each_other():
    model = tiny_model("2.3")
    apart = Transformer(replace(model.config, use_audio_video_cross_attention=False))
    missing = model.state_dict().keys() - apart.state_dict().keys()
    assert {
        n for n in missing if "audio_to_video" in n or "video_to_audio" in n or "a2v" in n or "av_ca" in n
    } == missing
    apart.load_state_dict({n: model.state_dict()[n] for n in apart.state_dict()})
    video, audio, _ = inputs("2.3", "joint")
    isolated = model(video, audio, [[("SKIP_A2V", None), ("SKIP_V2A", None)]] * 2)
    assert_equal(apart(video, audio), isolated)


def test_while_gradients_flow_every_module_runs_and_what_is_skipped_gets_exact_zeros():
    model = tiny_model("2.3")
    video, audio, _ = inputs("2.3", "joint")
    model(video, audio, [[("SKIP_A2V", None), ("SKIP_V2A", None)]] * 2).video.square().mean().backward()
    for name, parameter in model.named_parameters():
        exchange = "audio" in name or "a2v" in name or "v2a" in name
        if exchange and parameter.grad is not None:
            assert parameter.grad.abs().max() == 0, name
        assert exchange or parameter.grad is not None, name
    attention = model.transformer_blocks[0].audio_to_video_attn.to_q.weight
    assert attention.grad is not None


@torch.no_grad()
def test_a_disabled_stream_passes_unchanged_and_still_serves_the_other():
    model = tiny_model("2.3")
    video, audio, _ = inputs("2.3", "joint")
    frozen = model(video, replace(audio, enabled=False))
    assert (frozen.video - model(video, audio).video).abs().max() > 1e-3
    changed = replace(audio, context=audio.context + 1, enabled=False)
    assert_equal([model(video, changed).video], [frozen.video])


@torch.no_grad()
def test_the_keyframe_marker_counts_only_where_it_is_set():
    model = tiny_model("2.5")
    video, audio, _ = inputs("2.5", "joint")
    without = model(replace(video, keyframes_mask=None), audio)
    unset = model(replace(video, keyframes_mask=torch.zeros(2, 12, 1)), audio)
    assert_equal(without, unset)
    assert (model(video, audio).video - without.video).abs().max() > 1e-2


@torch.no_grad()
def test_bf16_follows_fp32():
    model = build("tiny")
    perturb(model)
    video, audio = random_inputs(model.config, 2, (3, 2, 2), 5, 4)
    exact = model.transformer(video, audio)
    rounded = model.to(torch.bfloat16).transformer(video, audio)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype is torch.bfloat16
        assert (a - b.float()).norm() / a.norm() < 0.05


def build(name: str, **fields):
    config = ModelConfig(name=name, **fields)
    model = build_model(config)
    with torch.no_grad():
        for key, tensor in initial_weights(model, config, seed=0):
            model.get_parameter(key).copy_(tensor)
    return model


def perturb(model):
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)


def test_initial_weights_are_a_function_of_seed_and_name():
    config = ModelConfig(name="tiny")
    model = build_model(config)
    first = dict(initial_weights(model, config, seed=0))
    assert first.keys() == dict(model.named_parameters()).keys()
    again = dict(reversed(list(initial_weights(model, config, seed=0))))
    other = dict(initial_weights(model, config, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.patchify_proj.weight"], other["transformer.patchify_proj.weight"])
    assert not torch.equal(*[first[f"transformer.transformer_blocks.{i}.attn1.to_q.weight"] for i in (0, 1)])


def test_the_first_prediction_is_the_mean_velocity():
    model = build("tiny")
    video, audio = random_inputs(model.config, 2, (3, 2, 2), 5, 4)
    assert all(v.abs().max() == 0 for v in model(video, audio))


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_every_parameter_learns_within_three_steps(name: str):
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    video, audio = random_inputs(model.config, 2, (3, 2, 2), 5, 4)
    video = replace(video, keyframes_mask=torch.ones(2, 12, 1))
    torch.manual_seed(0)
    targets = [torch.randn_like(video.latent), torch.randn_like(audio.latent)]
    moved = set()
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum((v - t).square().mean() for v, t in zip(model(video, audio), targets, strict=True))
        loss.backward()
        moved |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    # A bias on all keys alike moves every logit of a query alike: its gradient is zero by mathematics, save rounding.
    assert {n for n, _ in model.named_parameters()} - moved == set()


def test_connectors_fill_with_registers_and_ignore_padding():
    connectors = build("tiny").connectors
    width = connectors.video_embeddings_connector.learnable_registers.shape[1]
    torch.manual_seed(0)
    text = torch.randn(1, 3, width)
    right = torch.cat([text, torch.randn(1, 2, width)], 1)
    left = torch.cat([torch.randn(1, 2, width), text], 1)
    expected = connectors(text, None, None)[0]
    assert expected.shape[1] == 8
    assert_equal([connectors(right, None, torch.tensor([[1, 1, 1, 0, 0]]))[0]], [expected])
    assert_equal([connectors(left, None, torch.tensor([[0, 0, 1, 1, 1]]))[0]], [expected])
    with pytest.raises(ConfigError, match="multiple of 8 that holds 3"):
        connectors(text, None, None, 12)


def test_the_context_does_not_depend_on_the_length_of_other_captions():
    model = build("tiny")
    perturb(model)
    torch.manual_seed(0)
    text = torch.randn(1, 3, 40)
    longer = torch.cat([torch.cat([text, torch.zeros(1, 9, 40)], 1), torch.randn(1, 12, 40)])
    mask = torch.tensor([[1] * 3 + [0] * 9, [1] * 12])
    alone = model.connectors(text, None, None, model.text_tokens)[0]
    assert_equal([model.connectors(longer, None, mask, model.text_tokens)[0][:1]], [alone])


def test_frozen_connectors_record_no_gradients():
    model = build("tiny", train_connectors=False)
    perturb(model)
    video, audio = random_inputs(model.config, 2, (3, 2, 2), 5, 4)
    model(video, audio).video.square().mean().backward()
    assert all(p.grad is None for p in model.connectors.parameters())
    assert model.transformer.patchify_proj.weight.grad is not None


def test_headers_go_in_and_out_unchanged():
    for name in CONFIGURATIONS:
        config = named_config(name)
        assert TransformerConfig.from_header(config.to_header()) == config
        apart = replace(config, use_audio_video_cross_attention=False)
        assert TransformerConfig.from_header(apart.to_header()) == apart


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' .supported: 'rms_norm'"),
        ({"new_switch": True}, "new_switch=True .unknown"),
        ({"rope_type": "spiral"}, "spiral"),
        ({"audio_num_attention_heads": 3}, "must equal num_attention_heads"),
        ({"dropout": None}, "dropout=None"),
    ],
)
def test_an_unknown_architecture_is_refused(change: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        TransformerConfig.from_header(tiny_header("2.3") | change)


FRACTION = 2.5
JUNK = (None, "x", [], {}, True, -1, 0, FRACTION, float("nan"), float("inf"), 10**400)
ACCEPTED = {  # of the junk, by field; switches may also be true, and anything else is refused
    "timestep_scale_multiplier": [FRACTION],
    "av_ca_timestep_scale_multiplier": [FRACTION],
    "positional_embedding_theta": [FRACTION],
    "caption_channels": [None],
    "audio_connector_num_attention_heads": [None],
    "audio_connector_attention_head_dim": [None],
    "audio_connector_num_layers": [None],
}


@pytest.mark.parametrize("name", [f.name for f in fields(TransformerConfig)])
def test_every_field_of_a_header_has_a_type_and_a_bound(name: str):
    header = tiny_header("2.5")
    is_switch = isinstance(getattr(TransformerConfig.from_header(header), name), bool)
    accepted = [True] if is_switch else ACCEPTED.get(name, [])
    for value in JUNK:
        if any(value is one for one in accepted):
            assert getattr(TransformerConfig.from_header(header | {name: value}), name) is value
        else:
            with pytest.raises(CheckpointError, match=rf"{name}=.* \(needs .*\)"):
                TransformerConfig.from_header(header | {name: value})


def test_all_that_is_out_of_bounds_is_listed_at_once():
    junk = {
        "norm_eps": "x",
        "positional_embedding_max_pos": [],
        "num_layers": 10**9,
        "attention_bias": 1,
        "new": "y" * 99,
    }
    with pytest.raises(CheckpointError) as caught:
        TransformerConfig.from_header(tiny_header("2.3") | junk)
    for told in (
        "norm_eps='x' (needs a number above 0 and below 1)",
        "positional_embedding_max_pos=[] (needs a list of 3 whole numbers from 1)",
        "num_layers=1000000000 (needs a whole number from 1 to 512)",
        "attention_bias=1 (supported: True)",
        "new='yyyyyyyyyyyy...yyyyyyyyyyyyy' (unknown)",
    ):
        assert told in str(caught.value)
    wide = {"connector_num_attention_heads": 60_000, "connector_attention_head_dim": 60_000}
    with pytest.raises(ConfigError, match="the video connector is 3,600,000,000 wide"):
        named_config("tiny", wide)
    with pytest.raises(ConfigError, match="connector_attention_head_dim=7 must be even.*"):
        named_config("tiny", {"connector_attention_head_dim": 7})


def test_perturbing_a_block_that_is_not_there_is_an_error():
    model = tiny_model("2.3")
    video, audio, _ = inputs("2.3", "joint")
    with pytest.raises(ConfigError, match="blocks 0 to 1"):
        model(video, audio, [[("SKIP_VIDEO_SELF_ATTN", [28])], []])


def test_a_wrong_name_or_override_is_named():
    with pytest.raises(ConfigError, match="ltx2_19b"):
        named_config("ltx3")
    with pytest.raises(ConfigError, match="num_layer;"):
        named_config("tiny", {"num_layer": 3})
