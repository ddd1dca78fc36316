"""Samples: every file that is promised, the same clips on any number of ranks, sync of what is really heard."""

import json
import threading

import numpy as np
import pytest
import torch

from ltx2_train.codecs import build_audio_codec, build_video_codec
from ltx2_train.data.datasets import open_dataset
from ltx2_train.data.synthetic import WorldConfig, bounce_clip
from ltx2_train.diffusion.profiles import SamplerProfile, Schedule
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.evals.samples import (
    Codecs,
    Samples,
    SamplesConfig,
    Sampling,
    contact_sheet,
    events,
    peaks,
    request_like,
    strip,
)
from ltx2_train.media.probe import probe
from ltx2_train.model.modality import Velocity
from ltx2_train.record import Bucket, Sample, TextFeatures
from ltx2_train.testing.shards import random_sample, write_latent_dataset
from ltx2_train.testing.threads import on_ranks

NUM_CLIPS = 6


def silent_model(video, audio, perturbations=None):
    """Takes all noise to the mean of the data: velocity = latent, as if sigma were 1."""
    return Velocity(video.latent, audio.latent if audio is not None else None)


@pytest.fixture(scope="module")
def codecs():
    return Codecs(build_video_codec("dct"), build_audio_codec("dct"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, codecs):
    samples = [encoded(seed, codecs) for seed in range(NUM_CLIPS)]
    directory = tmp_path_factory.mktemp("heldout")
    write_latent_dataset(directory, [random_sample("image", Bucket(1, 2, 2, 0)), *samples])
    return open_dataset(directory)


def encoded(seed: int, codecs: Codecs) -> Sample:
    """A clip of the bounce world as latents."""
    clip = bounce_clip(seed, WorldConfig(width=64, height=64, frames=41, fps=24, silent_fraction=0, image_fraction=0))
    video = torch.from_numpy(clip.video).permute(3, 0, 1, 2).float() / 127.5 - 1
    text = TextFeatures(torch.randn(4, 32), torch.randn(4, 16))
    return Sample(
        key=f"clip-{seed}",
        video=codecs.video.encode(video[None])[0],
        audio=codecs.audio.encode(torch.as_tensor(clip.waveform)[None], 16000)[0],
        text=text,
        fps=24.0,
        caption=clip.caption,
    )


def sampled(world, dataset, codecs, directory):
    profile = SamplerProfile(name="two steps", steps=2, schedule=Schedule.shifted)
    sampling = Sampling(profile=profile, negative=dataset.null_text)
    config = SamplesConfig(clips=NUM_CLIPS, shown=1, batch_size=2)
    return Samples(dataset, sampling, codecs, config, world).run(silent_model, directory, step=3, weights="ema")


@pytest.fixture(scope="module")
def run(dataset, codecs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("samples")
    return directory, on_ranks(1, lambda world: sampled(world, dataset, codecs, directory))[0]


def test_every_named_file_is_there(run):
    directory, summary = run
    assert json.loads((directory / "samples.json").read_text()) == summary
    shown = summary["clips"][0]
    for side in (shown["sampled"], shown["real"]):
        for name in ("media", "strip", "mel"):
            assert (directory / side[name]).stat().st_size > 0
    assert (directory / summary["sheet"]).exists()
    assert "media" not in summary["clips"][1]["sampled"]


def test_the_film_has_the_size_and_length_of_the_real_clip_and_its_sound(run):
    directory, summary = run
    for side in ("sampled", "real"):
        info = probe(directory / summary["clips"][0][side]["media"])
        assert info.has_audio
        assert (info.width, info.height) == (64, 64)
        assert info.duration == pytest.approx(41 / 24, abs=0.06)


def test_images_are_not_asked_to_sound(run):
    assert "image" not in [clip["key"] for clip in run[1]["clips"]]


def test_real_clips_are_in_sync_after_the_codec_and_shuffled_ones_are_not(run):
    real = run[1]["sync"]["real"]
    assert real["f1"] > 0.9
    assert real["chance"] < 0.5
    assert real["low"] <= real["f1"] <= real["high"]
    assert real["impacts"] >= NUM_CLIPS


def test_two_ranks_sample_the_same_clips(run, dataset, codecs, tmp_path):
    for summary in on_ranks(2, lambda world: sampled(world, dataset, codecs, tmp_path)):
        mine, theirs = summary["clips"], run[1]["clips"]
        assert [(c["key"], c["seed"]) for c in mine] == [(c["key"], c["seed"]) for c in theirs]
        assert [c["real"]["impacts"] for c in mine] == [c["real"]["impacts"] for c in theirs]


@pytest.mark.parametrize("what", ["read", "decode"])
def test_what_fails_on_one_rank_fails_on_all_and_leaves_none_in_the_model(dataset, codecs, tmp_path, monkeypatch, what):
    owner = {"read": type(dataset), "decode": Codecs}[what]
    works, ranks = getattr(owner, what), []

    def fails_on_one(self, *args):
        ranks.append(threading.get_ident())
        if ranks[0] == threading.get_ident():
            raise DataError("clip-3 is broken")
        return works(self, *args)

    monkeypatch.setattr(owner, what, fails_on_one)

    def failure(world):
        with pytest.raises(DataError, match="clip-3 is broken") as caught:
            sampled(world, dataset, codecs, tmp_path)
        return caught.value.agreed

    assert on_ranks(2, failure) == [True, True]
    assert not (tmp_path / "samples.json").exists()


def test_a_silent_clip_is_asked_for_without_sound():
    sample = random_sample("silent", Bucket(2, 1, 1, 0))
    request = request_like(sample, sample.text, 0)
    assert not request.has_audio
    assert request.frames == 9


def test_sound_without_picture_is_refused_by_key():
    sample = random_sample("only-sound", Bucket(0, 0, 0, 4))
    with pytest.raises(DataError, match="only-sound"):
        request_like(sample, sample.text, 0)


def test_a_film_without_sound_has_no_onsets(codecs):
    latents = torch.zeros(128, 2, 2, 2)
    assert set(events(codecs.decode(latents, None, 24.0))) == {"impacts"}


def test_strips_and_sheets_have_the_frames_in_order():
    video = torch.linspace(-1, 1, 16)[None, :, None, None].expand(3, 16, 128, 64)
    frames = strip(video)
    assert frames.shape == (64, 8 * 32, 3)
    assert (np.diff(frames[0, ::32, 0].astype(int)) > 0).all()
    assert contact_sheet([frames] * 3).shape == (2 * 64 + 4, 2 * 256 + 8, 3)


def test_peaks_are_the_loudest_moments():
    waveform = torch.zeros(2, 4800)
    waveform[1, 2410] = -0.7
    found = peaks(waveform)
    assert max(found) == 0.7
    assert found.index(0.7) == 2410 // 20


def test_a_setting_out_of_its_bound_is_named():
    with pytest.raises(ConfigError, match="batch_size=0"):
        SamplesConfig(batch_size=0)
