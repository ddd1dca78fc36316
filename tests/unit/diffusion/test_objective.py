from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from ltx2_train.batch import Batch
from ltx2_train.diffusion.conditioning import ConditioningConfig
from ltx2_train.diffusion.objective import Losses, Objective, ObjectiveConfig
from ltx2_train.diffusion.sigmas import SigmaConfig
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import SKIP_A2V, SKIP_V2A, Modality, Velocity
from ltx2_train.record import Bucket
from ltx2_train.rng import BatchRng

SILENT, SOUND, IMAGE = Bucket(3, 2, 2, 0), Bucket(0, 0, 0, 5), Bucket(1, 2, 2, 0)


def rng_of(batch: Batch, seed: int = 1, step: int = 2) -> BatchRng:
    return BatchRng(seed, step, batch.positions)


def objective(
    null_text=None, *, keyframe_marker: bool = True, given: dict[str, float] | None = None, **config
) -> Objective:
    conditioning = [ConditioningConfig(kind=kind, probability=p) for kind, p in (given or {}).items()]
    return Objective(ObjectiveConfig(conditioning=conditioning, **config), null_text, keyframe_marker)


def timesteps_per_token(modality: Modality) -> Tensor:
    index = modality.timestep_index
    return modality.timesteps if index is None else modality.timesteps.gather(1, index)


def test_the_true_velocity_has_no_loss(make_batch):
    batch, aim = make_batch(bad=(2,)), objective(given={"first_frame": 0.5})
    task = aim.prepare(batch, rng_of(batch))
    losses = aim(lambda *_: Velocity(task.video.target, task.audio.target), batch, rng_of(batch))
    assert losses.total(losses.counts()) == 0


def test_the_noisy_latent_lies_on_the_path_and_the_target_leads_off_it(make_batch):
    batch = make_batch()
    task = objective(given={"first_frame": 0.5}, coupling="independent").prepare(batch, rng_of(batch))
    for stream, clean in (
        (task.video, batch.video.flatten(2).mT),
        (task.audio, batch.audio.transpose(1, 2).flatten(2)),
    ):
        sigma = timesteps_per_token(stream.modality)[..., None]
        torch.testing.assert_close(stream.modality.latent, clean + sigma * stream.target)


def test_the_loss_is_the_mean_over_generated_tokens_and_channels(make_batch):
    batch, aim = make_batch(), objective(given={"first_frame": 0.5})
    task = aim.prepare(batch, rng_of(batch))
    answer = Velocity(torch.randn_like(task.video.target), torch.randn_like(task.audio.target))
    losses = aim(lambda *_: answer, batch, rng_of(batch))
    first_frame_given = timesteps_per_token(task.video.modality)[:, 0] == 0
    assert 0 < first_frame_given.sum() < 4
    for i in range(4):
        counted = slice(4 if first_frame_given[i] else 0, None)
        expected = (answer.video - task.video.target)[i, counted].square().mean()
        torch.testing.assert_close(losses.video[i], expected)
        torch.testing.assert_close(losses.audio[i], (answer.audio - task.audio.target)[i].square().mean())


def test_a_samples_draws_do_not_depend_on_its_batch_mates(make_batch):
    aim = objective(given={"first_frame": 0.5, "given_audio": 0.3}, coupling="mixture")
    whole = make_batch()
    parts = [make_batch([0, 3]), make_batch([2]), make_batch([1])]
    task = aim.prepare(whole, rng_of(whole))
    for part in parts:
        alone, rows = aim.prepare(part, rng_of(part)), list(part.positions)
        for together, apart in ((task.video, alone.video), (task.audio, alone.audio)):
            assert torch.equal(together.target[rows], apart.target)
            assert torch.equal(together.sigma[rows], apart.sigma)
            assert torch.equal(together.modality.latent[rows], apart.modality.latent)
            assert torch.equal(together.has[rows], apart.has)


@pytest.mark.parametrize(
    "other",
    [
        {"coupling": "independent"},
        {"given": {"first_frame": 0.5, "given_audio": 0.5}},
        {"caption_dropout": 0.5},
        {"weight_audio": 3.0},
        {"keyframe_marker": False},
    ],
)
def test_a_setting_does_not_move_the_draws_of_another(make_batch, null_text, other):
    batch = make_batch()
    plain = objective(null_text).prepare(batch, rng_of(batch))
    changed = objective(null_text, **other).prepare(batch, rng_of(batch))
    assert torch.equal(plain.video.target, changed.video.target)
    assert torch.equal(plain.audio.target, changed.audio.target)
    assert torch.equal(plain.video.sigma, changed.video.sigma)


def test_seed_and_step_change_the_noise(make_batch):
    batch = make_batch()
    targets = [objective().prepare(batch, rng_of(batch, *key)).video.target for key in ((1, 2), (1, 3), (2, 2))]
    assert not torch.equal(targets[0], targets[1])
    assert not torch.equal(targets[0], targets[2])


def test_sigmas_of_the_streams_hang_together_as_asked(make_batch):
    batch = make_batch(range(400), Bucket(1, 1, 1, 1))

    def sigmas(coupling: str) -> tuple[Tensor, Tensor]:
        task = objective(coupling=coupling, shared_probability=0.25).prepare(batch, rng_of(batch))
        return task.video.sigma, task.audio.sigma

    shared, independent, mixture = sigmas("shared"), sigmas("independent"), sigmas("mixture")
    assert torch.equal(*shared)
    assert (independent[0] != independent[1]).all()
    equal = mixture[0] == mixture[1]
    assert equal.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(mixture[1][~equal], independent[1][~equal])


def test_each_stream_shifts_by_its_own_tokens_and_shared_by_the_videos(make_batch):
    batch = make_batch(range(64), Bucket(4, 32, 32, 1))
    independent = objective(coupling="independent").prepare(batch, rng_of(batch))
    assert independent.video.sigma.median() > 0.75  # 4096 tokens: 0.81
    assert independent.audio.sigma.median() < 0.7  # 1 token: 0.59
    shared = objective().prepare(batch, rng_of(batch))
    assert torch.equal(shared.audio.sigma, independent.video.sigma)
    sound_alone = objective(streams=["audio"]).prepare(batch, rng_of(batch))
    assert torch.equal(sound_alone.audio.sigma, independent.audio.sigma)


def test_a_fixed_sigma_replaces_the_drawn_ones(make_batch):
    batch = make_batch()
    task = objective().prepare(batch, rng_of(batch), sigma=0.4)
    assert (task.video.sigma == 0.4).all()
    assert (task.audio.modality.timesteps == 0.4).all()


def test_timesteps_are_compact(make_batch):
    batch = make_batch()
    plain = objective().prepare(batch, rng_of(batch)).video.modality
    assert plain.timesteps.shape == (4, 1)
    assert plain.timestep_index is None
    first_frame = objective(given={"first_frame": 1.0}).prepare(batch, rng_of(batch)).video.modality
    assert first_frame.timesteps.shape == (4, 2)
    assert first_frame.timestep_index.dtype == torch.int64
    assert (timesteps_per_token(first_frame)[:, :4] == 0).all()
    assert torch.equal(timesteps_per_token(first_frame)[:, 4:], first_frame.sigma[:, None].expand(4, 8))


def test_a_given_first_frame_is_clean_and_not_counted_and_a_lone_image_keeps_its_tokens(make_batch):
    aim = objective(given={"first_frame": 1.0})
    clip, image = make_batch(), make_batch(bucket=IMAGE)
    task = aim.prepare(clip, rng_of(clip))
    torch.testing.assert_close(task.video.modality.latent[:, :4], clip.video[:, :, 0].flatten(2).mT)
    lone = aim.prepare(image, rng_of(image)).video
    assert lone.denoise_mask is None
    assert (lone.modality.timesteps > 0).all()
    losses = aim(lambda v, a, _: Velocity(v.latent * 0, a.latent * 0), image, rng_of(image))
    assert (losses.video > 0).all()


@pytest.mark.parametrize(("given", "left"), [("video", "audio"), ("audio", "video")])
def test_beside_a_given_stream_the_other_may_follow_a_law_of_its_own(given, left, make_batch):
    """And nothing else moves: neither the samples to which nothing is given, nor the noise."""
    batch, kind = make_batch(), f"given_{given}"
    plain = objective(given={kind: 0.5}).prepare(batch, rng_of(batch))
    law = SigmaConfig(law="uniform", low=0.999, high=1.0)
    config = ObjectiveConfig(conditioning=[ConditioningConfig(kind=kind, probability=0.5, sigma=law)])
    task = Objective(config, None, True).prepare(batch, rng_of(batch))
    is_given = getattr(task, given).has == 0
    assert 0 < is_given.sum() < len(batch)
    assert (getattr(task, left).sigma[is_given] >= 0.999).all()
    assert (getattr(task, given).sigma[is_given] == 0).all()
    assert torch.equal(getattr(task, left).sigma[~is_given], getattr(plain, left).sigma[~is_given])
    assert torch.equal(getattr(task, left).target, getattr(plain, left).target)


def test_a_law_of_the_other_stream_needs_one():
    with pytest.raises(ConfigError, match="conditioning.first_frame.sigma"):
        ConditioningConfig(kind="first_frame", sigma=SigmaConfig())


@pytest.mark.parametrize("given", ["video", "audio"])
def test_a_given_stream_is_clean_has_sigma_zero_and_no_loss_but_passes_gradients(given, make_batch, fake_transformer):
    batch, other = make_batch(), {"video": "audio", "audio": "video"}[given]
    aim = objective(given={f"given_{given}": 1.0})
    task = getattr(aim.prepare(batch, rng_of(batch)), given)
    clean = batch.video.flatten(2).mT if given == "video" else batch.audio.transpose(1, 2).flatten(2)
    assert torch.equal(task.modality.latent, clean)
    assert (task.modality.sigma == 0).all()
    assert (task.modality.timesteps == 0).all()
    losses = aim(fake_transformer, batch, rng_of(batch))
    assert (getattr(losses, given) == 0).all()
    assert (getattr(losses, other) > 0).all()
    losses.total(losses.counts()).backward()
    assert getattr(fake_transformer, given).weight.grad.abs().sum() > 0  # the other stream listens to it


@pytest.mark.parametrize(("bucket", "missing"), [(SILENT, "audio"), (SOUND, "video")])
def test_a_missing_stream_gets_exactly_no_gradient(bucket, missing, make_batch, fake_transformer):
    batch = make_batch(bucket=bucket)
    losses = objective()(fake_transformer, batch, rng_of(batch))
    losses.total(losses.counts()).backward()
    silent = getattr(fake_transformer, missing), getattr(fake_transformer, f"{missing}_text")
    assert all((p.grad == 0).all() for module in silent for p in module.parameters())  # zero, not None: it ran
    assert (getattr(losses, missing) == 0).all()
    assert fake_transformer.calls[0][2] == [[(SKIP_A2V, None), (SKIP_V2A, None)]] * 4


def test_streams_that_are_both_there_are_not_perturbed(make_batch, fake_transformer):
    batch = make_batch()
    objective()(fake_transformer, batch, rng_of(batch))
    assert fake_transformer.calls[0][2] is None


def test_a_bad_record_moves_no_other_sample_and_poisons_nothing(make_batch, fake_transformer):
    good, with_bad = make_batch(), make_batch(bad=(1,))
    garbage = replace(with_bad, video=with_bad.video.clone(), audio=with_bad.audio.clone())
    garbage.video[1], garbage.audio[1] = float("nan"), float("inf")
    aim, kept = objective(given={"first_frame": 0.5}), [0, 2, 3]
    expected = aim(fake_transformer, good, rng_of(good))
    for batch in (with_bad, garbage):
        losses = aim(fake_transformer, batch, rng_of(batch))
        assert torch.equal(losses.video[kept], expected.video[kept])
        assert torch.equal(losses.audio[kept], expected.audio[kept])
        assert losses.video[1] == 0
        assert losses.audio[1] == 0
        assert losses.counts().tolist() == [3, 3]
        fake_transformer.zero_grad()
        losses.total(losses.counts()).backward()
        assert all(torch.isfinite(p.grad).all() for p in fake_transformer.parameters())


def test_a_nan_in_a_good_record_is_not_hidden(make_batch, fake_transformer):
    batch = make_batch()
    batch.video[2, 0, 0, 0, 0] = float("nan")
    losses = objective()(fake_transformer, batch, rng_of(batch))
    assert torch.isnan(losses.video).tolist() == [False, False, True, False]


def test_counts_are_known_before_the_model_runs(make_batch, fake_transformer):
    aim = objective(given={"first_frame": 0.5, "given_audio": 0.4, "given_video": 0.4})
    for bucket in (Bucket(3, 2, 2, 5), SILENT, SOUND, IMAGE):
        batch = make_batch(range(20), bucket, bad=(3, 5))
        counts = aim.counts(batch, rng_of(batch))
        assert torch.equal(counts, aim(fake_transformer, batch, rng_of(batch)).counts())
        assert counts.sum() > 0
    assert 0 < aim.counts(make_batch(range(20)), BatchRng(1, 2, range(20)))[0] < 20


def test_shares_of_a_step_add_up_to_the_weighted_means_over_samples(make_batch, fake_transformer):
    aim = objective(weight_video=2.0, weight_audio=0.5)
    batches = [make_batch([0, 1, 2]), make_batch([3, 4], SILENT), make_batch([5], bad=(5,))]
    losses = [aim(fake_transformer, batch, rng_of(batch)) for batch in batches]
    counts = sum(aim.counts(batch, rng_of(batch)) for batch in batches)
    video, audio = (torch.cat([getattr(part, name) for part in losses]) for name in ("video", "audio"))
    expected = 2.0 * video.sum() / 5 + 0.5 * audio.sum() / 3
    torch.testing.assert_close(sum(part.total(counts) for part in losses), expected)


def test_one_stream_alone_runs_without_the_other(make_batch, fake_transformer):
    batch = make_batch()
    losses = objective(streams=["video"])(fake_transformer, batch, rng_of(batch))
    video, audio, perturbations = fake_transformer.calls[0]
    assert video is not None
    assert audio is None
    assert perturbations is None
    assert losses.counts().tolist() == [4, 0]
    assert losses.total(losses.counts()) == losses.video.mean()


def test_captions_are_dropped_for_the_null_context_at_their_rate(make_batch, null_text):
    batch = make_batch(range(400), Bucket(1, 1, 1, 1))
    task = objective(null_text, caption_dropout=0.2).prepare(batch, rng_of(batch))
    for modality, null, text in (
        (task.video.modality, null_text.video, batch.video_text),
        (task.audio.modality, null_text.audio, batch.audio_text),
    ):
        dropped = (modality.context[:, 0] == null[0]).all(1)
        assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.06)
        assert torch.equal(modality.context[~dropped], text[~dropped])
        assert (modality.context[dropped][:, 1:] == 0).all()
        assert torch.equal(modality.context_mask.sum(1), torch.where(dropped, 1, 3))


def test_a_null_context_longer_than_the_captions_is_whole(make_batch):
    from ltx2_train.record import TextFeatures

    null, batch = TextFeatures(torch.ones(5, 6), torch.ones(5, 6)), make_batch(range(2))
    modality = objective(null, caption_dropout=1.0).prepare(batch, rng_of(batch)).video.modality
    assert torch.equal(modality.context, torch.ones(2, 5, 6))
    assert modality.context_mask is None


def test_a_text_mask_exists_only_where_lengths_differ(make_batch):
    alike, ragged = make_batch(), make_batch(lengths=[3, 1, 2, 3])
    assert objective().prepare(alike, rng_of(alike)).video.modality.context_mask is None
    mask = objective().prepare(ragged, rng_of(ragged)).audio.modality.context_mask
    assert mask.sum(1).tolist() == [3, 1, 2, 3]


def test_positions_are_shared_objects_and_follow_each_samples_frame_rate(make_batch, make_sample):
    one, two = make_batch([0, 1]), make_batch([2, 3, 4])
    first, second = (objective().prepare(batch, rng_of(batch)) for batch in (one, two))
    assert first.video.modality.positions is second.video.modality.positions  # so RoPE tables can be cached
    assert first.audio.modality.positions is second.audio.modality.positions
    mixed = replace(one, fps=(24.0, 12.0))
    positions = objective().prepare(mixed, rng_of(mixed)).video.modality.positions
    assert positions.shape == (2, 3, 12, 2)
    torch.testing.assert_close(positions[1, 0], 2 * positions[0, 0])


def test_the_first_latent_frame_is_marked_in_training_as_in_sampling(make_batch):
    batch = make_batch()
    marked = objective().prepare(batch, rng_of(batch)).video.modality.keyframes_mask
    assert marked.shape == (4, 12, 1)
    assert marked[0, :, 0].tolist() == [1] * 4 + [0] * 8
    assert objective(keyframe_marker=False).prepare(batch, rng_of(batch)).video.modality.keyframes_mask is None


def test_nothing_waits_for_the_device(make_batch, null_text):
    """Tensors on the meta device hold no values: reading one on the host would raise."""

    class MetaRng(BatchRng):
        def normal(self, purpose, shape, device="cpu"):
            return BatchRng.normal(self, purpose, shape).to(device)

    aim = objective(null_text, given={"first_frame": 0.5, "given_audio": 0.5}, coupling="mixture", caption_dropout=0.5)
    for bucket in (Bucket(3, 2, 2, 5), SILENT, SOUND):
        batch = make_batch(bucket=bucket).to("meta")
        rng = MetaRng(1, 2, batch.positions)
        losses = aim(lambda v, a, _: Velocity(v.latent, a.latent), batch, rng)
        assert losses.total(losses.counts() + aim.counts(batch, rng)).is_meta
        assert all(getattr(losses, f.name).is_meta for f in fields(Losses) if not f.name.startswith("weight"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coupling": "loose"}, "choose one of shared, independent, mixture"),
        ({"streams": []}, "streams"),
        ({"streams": ["video", "video"]}, "each once"),
        ({"caption_dropout": 1.5}, "caption_dropout=1.5"),
        ({"weight_video": -1.0}, "weight_video=-1.0"),
        ({"weight_video": 0.0, "streams": ["video"]}, "weight_video"),
        ({"streams": ["video"], "conditioning": [ConditioningConfig(kind="given_audio")]}, "given_audio"),
        ({"streams": ["audio"], "conditioning": [ConditioningConfig(kind="first_frame")]}, "first_frame"),
    ],
)
def test_the_configuration_names_the_field_that_is_wrong(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**wrong)


def test_caption_dropout_needs_a_null_context():
    with pytest.raises(ConfigError, match="no null context"):
        objective(caption_dropout=0.1)
