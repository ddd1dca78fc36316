"""diffusers' transformer, holding the same weights, gives the same numbers."""

from dataclasses import replace

import pytest
import torch

from tests.golden.transformer_cases import inputs, tiny_model
from tests.peers.diffusers_transformer import correct_gate, peer_arguments, peer_of, random_inputs

VARIANTS = ["2.0", "2.3", "2.5", "2.5kv"]
ATOL = 2e-5


@pytest.fixture(autouse=True)
def _diffusers():
    pytest.importorskip("diffusers")


def compare(peer, arguments, velocity):
    video, audio = peer(**arguments, return_dict=False)
    torch.testing.assert_close(velocity.video, video, atol=ATOL, rtol=0)
    torch.testing.assert_close(velocity.audio, audio, atol=ATOL, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_text_to_audio_video_equals_diffusers(variant: str):
    """One sigma for both streams: the case in which diffusers follows the published arithmetic."""
    model = tiny_model(variant)
    video, audio = random_inputs(model.config, batch=2, grid=(3, 2, 2), steps=5, text=4)
    compare(peer_of(model), peer_arguments(video, audio), model(video, audio))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_given_tokens_and_two_sigmas_equal_diffusers_with_its_gate_put_right(variant: str):
    model = tiny_model(variant)
    video, audio, _ = inputs(variant, "joint")
    peer = peer_of(model)
    correct_gate(peer, video, audio)
    compare(peer, peer_arguments(video, audio), model(video, audio))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_text_masks_and_guidance_perturbations_equal_diffusers(variant: str):
    model = tiny_model(variant)
    video, audio, _ = inputs(variant, "joint-masks-stg")
    video = replace(video, attention_mask=None)
    peer = peer_of(model)
    correct_gate(peer, video, audio)
    stg = [[("SKIP_VIDEO_SELF_ATTN", [1]), ("SKIP_AUDIO_SELF_ATTN", [1])]]
    arguments = peer_arguments(video, audio) | {
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.tensor([1.0, 0.0]),
    }
    compare(peer, arguments, model(video, audio, [[], *stg]))
    isolated = peer_arguments(video, audio) | {"isolate_modalities": True}
    compare(peer, isolated, model(video, audio, [[("SKIP_A2V", None), ("SKIP_V2A", None)]] * 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_diffusers(variant: str):
    from tests.peers.diffusers_transformer import peer_key

    model = tiny_model(variant)
    video, audio = random_inputs(model.config, batch=2, grid=(3, 2, 2), steps=5, text=4)
    video = replace(video, keyframes_mask=torch.ones(2, 12, 1))
    peer = peer_of(model)
    out = model(video, audio)
    (out.video.square().mean() + out.audio.square().mean()).backward()
    peer_video, peer_audio = peer(**peer_arguments(video, audio), return_dict=False)
    (peer_video.square().mean() + peer_audio.square().mean()).backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[peer_key(name)].grad
        if expected is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected, atol=2e-5, rtol=2e-3, msg=f"gradient of {name}")
