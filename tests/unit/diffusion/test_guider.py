import math

import pytest
import torch

from ltx2_train import geometry
from ltx2_train.diffusion.conditioning import no_conditioning
from ltx2_train.diffusion.guidance import GuidanceConfig, combine
from ltx2_train.diffusion.guider import Contexts, Guider, StreamInputs
from ltx2_train.diffusion.path import to_denoised
from ltx2_train.diffusion.sampler import Streams
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import SKIP_A2V, SKIP_V2A
from ltx2_train.record import Bucket
from tests.golden.transformer_cases import tiny_model

FULL = GuidanceConfig(cfg=3.0, stg=1.0, stg_blocks=[1], modality=3.0, rescale=0.7)
SIGMA = torch.tensor(0.5)


def inputs(
    positions: torch.Tensor, guidance: GuidanceConfig, batch_size: int = 2, text: tuple[int, int] = (3, 6)
) -> StreamInputs:
    contexts = Contexts(torch.randn(batch_size, *text), torch.randn(batch_size, *text), None)
    conditioning = no_conditioning(Bucket(1, 2, 2, 5), batch_size, torch.device("cpu")).video
    return StreamInputs(conditioning=conditioning, positions=positions, contexts=contexts, guidance=guidance)


def both_inputs(guidance: GuidanceConfig, audio: GuidanceConfig | None = None) -> tuple[StreamInputs, StreamInputs]:
    video = geometry.latent_video_positions(1, 2, 2, 24.0)[None]
    return inputs(video, guidance), inputs(geometry.audio_positions(5)[None], audio or guidance)


def noise(video_channels: int = 128, audio_channels: int = 128) -> Streams:
    return Streams(torch.randn(2, 4, video_channels), torch.randn(2, 5, audio_channels))


def test_all_passes_share_one_forward_and_their_texts(fake_transformer):
    given = both_inputs(FULL)
    Guider(fake_transformer, *given)(noise(), SIGMA)
    video, audio, perturbations = fake_transformer.calls[0]
    assert len(fake_transformer.calls) == 1
    assert video.latent.shape == (8, 4, 128)
    assert audio.timesteps.shape == (8, 1)
    assert video.positions is given[0].positions  # one row, the same object in every step
    cond, uncond, perturbed, isolated = video.context
    assert cond is perturbed is isolated
    assert torch.equal(cond.features, given[0].contexts.positive)
    assert torch.equal(uncond.features, given[0].contexts.negative)
    assert perturbations[:4] == [[]] * 4
    assert perturbations[6] == [(SKIP_A2V, None), (SKIP_V2A, None)]


def test_the_guider_combines_what_single_passes_give(fake_transformer):
    video, audio = both_inputs(FULL)
    noisy = noise()
    guided = Guider(fake_transformer, video, audio)(noisy, SIGMA)
    calls = fake_transformer.calls[0]
    with torch.no_grad():
        velocity = fake_transformer(*calls)
    passes = to_denoised(noisy.video.repeat(4, 1, 1), velocity.video, SIGMA).chunk(4)
    for i in range(2):
        rows = [denoised[i] for denoised in passes]
        torch.testing.assert_close(guided.video[i], combine(*rows, guidance=FULL))


def test_the_guider_alone_with_one_stream(fake_transformer):
    video, _ = both_inputs(FULL)
    guided = Guider(fake_transformer, video, None)(Streams(torch.randn(2, 4, 128), None), SIGMA)
    assert guided.audio is None
    assert fake_transformer.calls[0][0].latent.shape == (6, 4, 128)


@pytest.mark.parametrize(("at_once", "forwards"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (3, [2, 2]), (4, [4])])
@torch.no_grad()
def test_passes_give_the_same_together_and_apart(at_once, forwards):
    """Three steps of a released architecture, computed in fp64: the later ones use what is kept of the text."""
    model = tiny_model("2.0").double()
    torch.manual_seed(0)
    width = model.config.caption_channels
    video, audio = (
        inputs(positions, FULL, text=(3, width))
        for positions in (geometry.latent_video_positions(1, 2, 2, 24.0)[None], geometry.audio_positions(5)[None])
    )
    rows = []

    def counted(*arguments):
        rows.append(len(arguments[0].latent) // 2)
        return model(*arguments)

    together = Guider(model, video, audio, torch.float64)
    apart = Guider(counted, video, audio, torch.float64, passes_at_once=at_once)
    for sigma in (1.0, 0.6, 0.2):
        noisy = noise(model.config.in_channels, model.config.audio_in_channels)
        found = [guider(noisy, torch.tensor(sigma)) for guider in (together, apart)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * a.abs().max().item(), rtol=0)
    assert rows == 3 * forwards


def test_a_bound_below_one_pass_is_refused(fake_transformer):
    with pytest.raises(ConfigError, match="passes_at_once=0"):
        Guider(fake_transformer, *both_inputs(FULL), passes_at_once=0)


def test_outside_of_its_interval_guidance_costs_nothing(fake_transformer):
    narrow = GuidanceConfig(cfg=3.0, sigma_low=0.3, sigma_high=0.7)
    guider = Guider(fake_transformer, *both_inputs(narrow, GuidanceConfig(cfg=2.0, sigma_low=0.6)))
    for sigma in (0.9, 0.65, 0.5, 0.2):
        guider(noise(), torch.tensor(sigma))
    assert [len(video.latent) // 2 for video, _, _ in fake_transformer.calls] == [2, 2, 2, 1]
    assert fake_transformer.calls[0][0].context[0] is fake_transformer.calls[3][0].context[0]


def test_a_stream_that_skips_a_step_keeps_its_result_and_serves_the_other(fake_transformer):
    every_third = GuidanceConfig(cfg=3.0, skip_step=2)
    guider = Guider(fake_transformer, *both_inputs(every_third, FULL))
    found = [guider(noise(), torch.tensor(sigma)) for sigma in (1.0, 0.8, 0.6, 0.4)]
    assert [video.enabled for video, _, _ in fake_transformer.calls] == [True, False, False, True]
    assert found[1].video is found[0].video
    assert found[2].video is found[0].video
    assert not torch.equal(found[3].video, found[0].video)
    assert not torch.equal(found[1].audio, found[0].audio)


def test_a_step_that_both_streams_skip_has_no_forward(fake_transformer):
    guider = Guider(fake_transformer, *both_inputs(GuidanceConfig(skip_step=1)))
    found = [guider(noise(), torch.tensor(sigma)) for sigma in (1.0, 0.8, 0.6)]
    assert len(fake_transformer.calls) == math.ceil(len(found) / 2)
    assert found[1] is found[0]
