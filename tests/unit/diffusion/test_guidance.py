import pytest
import torch

from ltx2_train import geometry
from ltx2_train.diffusion.conditioning import no_conditioning
from ltx2_train.diffusion.guidance import Contexts, GuidanceConfig, Guider, StreamInputs, combine, needed_passes
from ltx2_train.diffusion.path import to_denoised
from ltx2_train.diffusion.sampler import Streams
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import SKIP_A2V, SKIP_AUDIO_SELF_ATTN, SKIP_V2A, SKIP_VIDEO_SELF_ATTN
from ltx2_train.record import Bucket

FULL = GuidanceConfig(cfg=3.0, stg=1.0, stg_blocks=[1], modality=3.0, rescale=0.7)


def waves() -> list[torch.Tensor]:
    n = torch.arange(1, 13, dtype=torch.float64)
    pairs = ((0.3, 0.1), (0.31, 0.2), (0.29, 0.3), (0.33, 0.4))
    return [torch.sin(w * n + p).float().reshape(1, 4, 3) for w, p in pairs]


def test_guidance_gives_the_published_numbers():
    out = combine(*waves(), cfg=3.0, stg=1.0, modality=3.0, rescale=0.7)
    expected = torch.tensor([-0.381516, -0.080944, 0.253302, 0.595216])
    torch.testing.assert_close(out.flatten()[:4], expected, atol=1e-6, rtol=0)


def test_neutral_guidance_is_the_prediction_itself():
    cond = waves()[0]
    assert torch.equal(combine(cond, None, None, None, cfg=3.0, stg=1.0, modality=3.0, rescale=0.0), cond)
    assert torch.equal(combine(*waves(), cfg=1.0, stg=0.0, modality=1.0, rescale=0.0), cond)
    torch.testing.assert_close(combine(*waves(), cfg=1.0, stg=0.0, modality=1.0, rescale=0.7), cond)


def test_full_rescale_restores_the_deviation():
    cond, *others = waves()
    out = combine(cond, *others, cfg=5.0, stg=1.0, modality=2.0, rescale=1.0)
    torch.testing.assert_close(out.std(), cond.std())


def test_guidance_keeps_the_dtype_and_computes_in_fp32():
    low = [wave.bfloat16() for wave in waves()]
    out = combine(*low, cfg=3.0, stg=1.0, modality=3.0, rescale=0.7)
    exact = combine(*(wave.float() for wave in low), cfg=3.0, stg=1.0, modality=3.0, rescale=0.7)
    assert torch.equal(out, exact.bfloat16())


def test_only_the_needed_passes_run_and_in_their_order():
    plain, cfg = GuidanceConfig(), GuidanceConfig(cfg=2.0)
    assert [p.name for p in needed_passes(plain, plain)] == ["cond"]
    assert [p.name for p in needed_passes(plain, cfg)] == ["cond", "uncond"]
    assert [p.name for p in needed_passes(FULL, plain)] == ["cond", "uncond", "perturbed", "isolated"]
    assert [p.name for p in needed_passes(FULL, None)] == ["cond", "uncond", "perturbed"]
    assert needed_passes(FULL, plain)[2].perturbation == [(SKIP_VIDEO_SELF_ATTN, [1])]
    both = [(SKIP_VIDEO_SELF_ATTN, [1]), (SKIP_AUDIO_SELF_ATTN, [1])]
    assert needed_passes(FULL, FULL)[2].perturbation == both
    assert needed_passes(FULL, plain)[3].perturbation == [(SKIP_A2V, None), (SKIP_V2A, None)]


def inputs(positions: torch.Tensor, guidance: GuidanceConfig, batch_size: int = 2) -> StreamInputs:
    contexts = Contexts(torch.randn(batch_size, 3, 6), torch.randn(batch_size, 3, 6), None)
    conditioning = no_conditioning(Bucket(1, 2, 2, 5), batch_size, torch.device("cpu")).video
    return StreamInputs(conditioning=conditioning, positions=positions, contexts=contexts, guidance=guidance)


def both_inputs(guidance: GuidanceConfig) -> tuple[StreamInputs, StreamInputs]:
    video = geometry.latent_video_positions(1, 2, 2, 24.0)[None]
    return inputs(video, guidance), inputs(geometry.audio_positions(5)[None], guidance)


def test_all_passes_share_one_forward(fake_transformer):
    guider = Guider(fake_transformer, *both_inputs(FULL))
    noisy = Streams(torch.randn(2, 4, 128), torch.randn(2, 5, 128))
    guider(noisy, torch.tensor(0.5))
    video, audio, perturbations = fake_transformer.calls[0]
    assert len(fake_transformer.calls) == 1
    assert video.latent.shape == (8, 4, 128)
    assert audio.timesteps.shape == (8, 1)
    assert video.positions is guider.video.inputs.positions  # one row, the same object in every step
    assert perturbations[:4] == [[]] * 4
    assert perturbations[6] == [(SKIP_A2V, None), (SKIP_V2A, None)]


def test_the_guider_combines_what_single_passes_give(fake_transformer):
    video, audio = both_inputs(FULL)
    noisy, sigma = Streams(torch.randn(2, 4, 128), torch.randn(2, 5, 128)), torch.tensor(0.5)
    guided = Guider(fake_transformer, video, audio)(noisy, sigma)
    calls = fake_transformer.calls[0]
    with torch.no_grad():
        velocity = fake_transformer(*calls)
    passes = to_denoised(noisy.video.repeat(4, 1, 1), velocity.video, sigma).chunk(4)
    for i in range(2):
        rows = [denoised[i] for denoised in passes]
        torch.testing.assert_close(guided.video[i], combine(*rows, cfg=3.0, stg=1.0, modality=3.0, rescale=0.7))


def test_the_guider_alone_with_one_stream(fake_transformer):
    video, _ = both_inputs(FULL)
    guided = Guider(fake_transformer, video, None)(Streams(torch.randn(2, 4, 128), None), torch.tensor(0.5))
    assert guided.audio is None
    assert fake_transformer.calls[0][0].latent.shape == (6, 4, 128)


@pytest.mark.parametrize("wrong", [{"rescale": 1.5}, {"stg": 1.0}, {"stg_blocks": [-1]}])
def test_the_configuration_names_the_field_that_is_wrong(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GuidanceConfig(**wrong)
