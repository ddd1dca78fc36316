from dataclasses import replace

import pytest
import torch

from ltx2_train.diffusion.generate import Request, generate
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.objective import Objective, ObjectiveConfig
from ltx2_train.diffusion.profiles import SamplerProfile, profile
from ltx2_train.diffusion.sampler import Sampler
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.model.modality import Velocity
from ltx2_train.model.patchify import patchify_audio, patchify_video
from ltx2_train.record import TextFeatures
from ltx2_train.rng import BatchRng

FULL = GuidanceConfig(cfg=3.0, stg=1.0, stg_blocks=[0], modality=2.0, rescale=0.7)
SAMPLER = SamplerProfile(name="test", steps=4, tokens="actual", video=FULL, audio=FULL)
CLIP = {"frames": 17, "height": 64, "width": 64, "fps": 24.0}  # latents 3 x 2 x 2, 18 audio steps


@pytest.fixture
def make_request(make_sample, null_text):
    def make(seed: int = 0, length: int = 3, **fields) -> Request:
        g = torch.Generator().manual_seed(seed)
        text = TextFeatures(torch.randn(length, 6, generator=g), torch.randn(length, 6, generator=g))
        return Request(text=text, negative=null_text, seed=seed, **{**CLIP, **fields})

    return make


def test_latents_have_the_shapes_of_the_request(make_request, fake_transformer):
    out = generate(fake_transformer, [make_request(i) for i in range(2)], SAMPLER)
    assert out.video.shape == (2, 128, 3, 2, 2)
    assert out.audio.shape == (2, 8, 18, 16)
    assert not out.video.requires_grad
    assert len(fake_transformer.calls) == 4


def test_a_request_does_not_depend_on_its_batch_mates(make_request, fake_transformer):
    """Seeds, captions of other lengths, frame rates, first frames and given sound: none of it is seen next door."""
    sound, frame = torch.randn(8, 18, 16), torch.randn(128, 1, 2, 2)
    requests = [
        make_request(1),
        make_request(2, length=5),
        make_request(3, first_frame=frame),
        make_request(4, given_audio=sound),
        make_request(5, fps=23.976),
    ]
    together = generate(fake_transformer, requests, SAMPLER)
    for i, request in enumerate(requests):
        alone = generate(fake_transformer, request, SAMPLER)
        torch.testing.assert_close(together.video[i], alone.video[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(together.audio[i], alone.audio[0], atol=2e-5, rtol=1e-4)


def test_the_seed_decides(make_request, fake_transformer):
    one, again = (generate(fake_transformer, make_request(1), SAMPLER) for _ in range(2))
    other = generate(fake_transformer, replace(make_request(1), seed=2), SAMPLER)
    assert torch.equal(one.video, again.video)
    assert torch.equal(one.audio, again.audio)
    assert not torch.equal(one.video, other.video)


def test_a_model_that_knows_the_data_generates_it(make_request):
    video, audio = torch.randn(1, 128, 3, 2, 2), torch.randn(1, 8, 18, 16)

    def oracle(v, a, _) -> Velocity:
        answers = []
        for modality, clean in ((v, patchify_video(video)), (a, patchify_audio(audio))):
            answers.append((modality.latent - clean) / modality.timesteps[..., None])
        return Velocity(*answers)

    plain = SamplerProfile(name="plain", steps=5)
    out = generate(oracle, make_request(), plain)
    torch.testing.assert_close(out.video, video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.audio, audio, atol=1e-5, rtol=1e-5)


def test_given_latents_come_back_and_are_shown_clean(make_request, fake_transformer):
    frame, sound = torch.randn(128, 1, 2, 2), torch.randn(8, 18, 16)
    out = generate(fake_transformer, make_request(first_frame=frame, given_audio=sound), SAMPLER)
    torch.testing.assert_close(out.video[0, :, :1], frame)
    torch.testing.assert_close(out.audio[0], sound)
    video, audio, _ = fake_transformer.calls[0]
    assert (audio.sigma == 0).all()
    assert (audio.timesteps == 0).all()
    assert (video.timesteps.gather(1, video.timestep_index)[:, :4] == 0).all()
    assert (video.sigma == 1).all()


def test_a_whole_given_video_comes_back(make_request, fake_transformer):
    picture = torch.randn(128, 3, 2, 2)
    out = generate(fake_transformer, make_request(given_video=picture), SAMPLER)
    torch.testing.assert_close(out.video[0], picture)


def test_one_stream_can_be_asked_for_alone(make_request, fake_transformer):
    silent = generate(fake_transformer, make_request(has_audio=False), SAMPLER)
    assert silent.audio is None
    assert silent.video.shape == (1, 128, 3, 2, 2)
    sound = generate(fake_transformer, make_request(has_video=False), SAMPLER)
    assert sound.video is None
    assert sound.audio.shape == (1, 8, 18, 16)


def test_sampling_shows_the_model_what_training_shows_it(make_request, make_batch, fake_transformer):
    """Same fields, same shapes, same positions and markers; only the latents and sigmas are others."""
    generate(fake_transformer, make_request(), profile("demo"))
    batch = make_batch(range(1), bucket=make_request().bucket)
    Objective(ObjectiveConfig(), None, keyframe_marker=True)(fake_transformer, batch, BatchRng(0, 0, [0]))
    (video, audio, _), (train_video, train_audio, _) = fake_transformer.calls[0], fake_transformer.calls[-1]
    for sampled, trained in ((video, train_video), (audio, train_audio)):
        assert sampled.positions is trained.positions
        assert sampled.latent.shape[1:] == trained.latent.shape[1:]
        assert sampled.timesteps.shape[1:] == trained.timesteps.shape[1:]
    assert torch.equal(video.keyframes_mask[:1], train_video.keyframes_mask)


def test_generation_leaves_cached_positions_fit_for_training(make_request, make_batch, fake_transformer):
    generate(fake_transformer, make_request(), SAMPLER)
    positions = fake_transformer.calls[0][0].positions
    assert not positions.is_inference()


def test_nothing_waits_for_the_device(make_request):
    """Tensors on the meta device hold no values: reading one on the host would raise."""
    requests = [make_request(1), make_request(2, first_frame=torch.randn(128, 1, 2, 2))]
    out = generate(lambda v, a, _: Velocity(v.latent, a.latent), requests, SAMPLER, device="meta", dtype=torch.bfloat16)
    assert out.video.is_meta
    assert out.video.dtype == torch.float32


def test_errors_name_the_field_and_the_bound(make_request, fake_transformer):
    with pytest.raises(DataError, match="nearest: 17"):
        generate(fake_transformer, make_request(frames=16), SAMPLER)
    with pytest.raises(DataError, match="height of 70 px"):
        make_request(height=70)
    with pytest.raises(ConfigError, match=r"first_frame: shape \(128, 2, 2, 2\)"):
        make_request(first_frame=torch.zeros(128, 2, 2, 2))
    with pytest.raises(ConfigError, match="nothing to generate"):
        make_request(given_video=torch.zeros(128, 3, 2, 2), has_audio=False)
    with pytest.raises(ConfigError, match="those of one size"):
        generate(fake_transformer, [make_request(), make_request(frames=9)], SAMPLER)
    with pytest.raises(ConfigError, match="latent sizes none"):
        generate(fake_transformer, [], SAMPLER)


NOISY = [replace(SAMPLER, sampler=name) for name in ("euler_ancestral", "res_2s")]


@pytest.mark.parametrize("sampler", NOISY, ids=lambda p: p.sampler.value)
def test_noise_on_the_way_is_a_requests_own(make_request, fake_transformer, sampler):
    frame, sound = torch.randn(128, 1, 2, 2), torch.randn(8, 18, 16)
    requests = [make_request(1), make_request(2, first_frame=frame), make_request(3, given_audio=sound)]
    together = generate(fake_transformer, requests, sampler)
    for i, request in enumerate(requests):
        alone = generate(fake_transformer, request, sampler)
        torch.testing.assert_close(together.video[i], alone.video[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(together.audio[i], alone.audio[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(together.video[1, :, :1], frame)
    torch.testing.assert_close(together.audio[2], sound)
    other = generate(fake_transformer, replace(requests[0], seed=9), sampler)
    assert not torch.allclose(other.video[0], together.video[0], atol=1e-2)


@pytest.mark.parametrize("name", list(Sampler))
def test_what_is_given_comes_back_bit_for_bit_from_every_sampler(make_request, fake_transformer, name):
    frame, sound, picture = torch.randn(128, 1, 2, 2), torch.randn(8, 18, 16), torch.randn(128, 3, 2, 2)
    requests = [
        make_request(1, first_frame=frame),
        make_request(2, given_audio=sound),
        make_request(3, given_video=picture),
    ]
    out = generate(fake_transformer, requests, replace(SAMPLER, sampler=name))
    assert torch.equal(out.video[0, :, :1], frame)
    assert torch.equal(out.audio[1], sound)
    assert torch.equal(out.video[2], picture)


@pytest.mark.parametrize("sampler", NOISY, ids=lambda p: p.sampler.value)
def test_the_model_sees_what_is_given_without_noise_in_every_call(make_request, fake_transformer, sampler):
    frame = torch.randn(128, 1, 2, 2)
    generate(fake_transformer, make_request(first_frame=frame), sampler)
    tokens = patchify_video(frame[None])
    assert len(fake_transformer.calls) == sampler.calls
    for video, _, _ in fake_transformer.calls:
        torch.testing.assert_close(video.latent[:, :4], tokens.expand(len(video.latent), -1, -1), atol=1e-5, rtol=0)


def test_what_starts_from_noise_needs_a_schedule_that_does(make_request, fake_transformer):
    refining = replace(SAMPLER, schedule="distilled_refine", steps=3)
    with pytest.raises(ConfigError, match="starts at sigma 0.909375"):
        generate(fake_transformer, make_request(), refining)
