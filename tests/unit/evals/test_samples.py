"""Samples: every file that is promised, the same clips on any number of ranks, sync of what is really heard."""

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from ltx2_train.codecs import build_audio_codec, build_video_codec
from ltx2_train.data.datasets import open_dataset
from ltx2_train.data.synthetic import WorldConfig, bounce_clip
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.profiles import SamplerProfile, Schedule
from ltx2_train.diffusion.sigmas import shifted_schedule
from ltx2_train.distributed.lock import LOCK
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.evals.metrics import names
from ltx2_train.evals.samples import (
    Codecs,
    Samples,
    SamplesConfig,
    Sampling,
    contact_sheet,
    events,
    peaks,
    request_like,
    samples_identity,
    strip,
    sync_figures,
)
from ltx2_train.evals.unfinished import Unfinished
from ltx2_train.media.probe import probe
from ltx2_train.model.modality import Stream, Velocity
from ltx2_train.record import Bucket, Sample, TextFeatures
from ltx2_train.testing.shards import random_sample, write_latent_dataset
from ltx2_train.testing.threads import on_ranks
from tests.unit.evals.locked import locked

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


def samples(world, dataset, codecs, streams=frozenset(Stream), **settings):
    profile = SamplerProfile(name="two steps", steps=2, schedule=Schedule.shifted)
    sampling = Sampling(profile=profile, negative=dataset.null_text, streams=streams)
    config = SamplesConfig(**{"clips": NUM_CLIPS, "shown": 1, "batch_size": 2} | settings)
    return Samples(dataset, sampling, codecs, config, world)


def sampled(world, dataset, codecs, directory, **settings):
    return samples(world, dataset, codecs, **settings).run(silent_model, directory, step=3, weights="ema")


@pytest.fixture(scope="module")
def run(dataset, codecs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("samples")
    return directory, on_ranks(1, lambda world: sampled(world, dataset, codecs, directory))[0]


ONE_STREAM = {
    Stream.video: ("the sound", {"media", "strip"}, {"motion"}),
    Stream.audio: ("the picture", {"media", "mel", "peaks"}, {"loudness", "silence"}),
}


@pytest.mark.parametrize("stream", list(Stream))
def test_a_model_that_trained_one_stream_is_asked_for_that_alone(dataset, codecs, tmp_path, stream):
    other, files, measured = ONE_STREAM[stream]

    def model(video, audio, perturbations=None):
        streams = {Stream.video: video, Stream.audio: audio}
        assert [name for name, one in streams.items() if one is not None] == [stream], f"{other} was never trained"
        return Velocity(*(None if one is None else one.latent for one in (video, audio)))

    def made(world):
        named = {"clips": 2, "metrics": ["motion", "loudness", "silence", "onset_f1"]}
        one = samples(world, dataset, codecs, streams=frozenset({stream}), **named)
        return one.run(model, tmp_path, step=3, weights="raw")

    for summary in on_ranks(2, made):
        assert summary["sync"] is None
        for side in ("sampled", "real"):
            shown = summary["clips"][0][side]
            assert files == shown.keys() & {"media", "strip", "mel", "peaks"}, side
            info = probe(tmp_path / shown["media"])
            assert (info.has_video, info.has_audio) == (stream is Stream.video, stream is Stream.audio)
            for name, found in summary["metrics"].items():
                assert (found[side]["value"] is not None) == (name in measured), name
                assert found[side]["note"].startswith("not measured: ") == (name not in measured), name


def test_clips_are_chosen_by_the_streams_that_were_trained(codecs, tmp_path):
    """A picture, a silent film and sound alone, beside a film with sound."""
    sizes = [Bucket(1, 1, 1, 0), Bucket(2, 1, 1, 0), Bucket(0, 0, 0, 5), Bucket(2, 1, 1, 5)]
    write_latent_dataset(tmp_path / "all", [random_sample(f"{i}", size) for i, size in enumerate(sizes)])
    write_latent_dataset(tmp_path / "silent", [random_sample("0", sizes[1])])

    def chosen(world, name, *streams):
        dataset = open_dataset(tmp_path / name)
        sampling = Sampling(profile=SamplerProfile(name="t"), negative=dataset.null_text, streams=frozenset(streams))
        made = Samples(dataset, sampling, codecs, SamplesConfig(clips=9, metrics=[]), world)
        return [dataset.index.key(i) for i in made.indices]

    def check(world):
        assert chosen(world, "all", *Stream) == ["3"]
        assert chosen(world, "all", Stream.video) == ["1", "3"]
        assert chosen(world, "all", Stream.audio) == ["2", "3"]
        with pytest.raises(DataError, match="silent holds no samples with audio, .*evaluation.samples=null"):
            chosen(world, "silent", Stream.audio)
        return True

    assert on_ranks(1, check) == [True]


class Travelling:
    """A codec that notes where it lies."""

    def __init__(self, codec, places):
        self.codec, self.places, self.name = codec, places, codec.name

    def __getattr__(self, name):
        return getattr(self.codec, name)

    def to(self, device):
        self.places.append(str(device))

    def decode(self, latents):
        self.places.append("decodes")
        return self.codec.decode(latents)


def test_the_codecs_are_on_the_device_only_while_they_decode(dataset, codecs, tmp_path):
    video, audio = [], []
    moving = Codecs(Travelling(codecs.video, video), Travelling(codecs.audio, audio))
    few = {"clips": 2, "shown": 0, "metrics": []}
    on_ranks(1, lambda world: sampled(world, dataset, moving, tmp_path, **few))
    device = "cpu"  # of the rank; what matters is the order
    assert video == audio == ["cpu", device, *["decodes"] * 4, "cpu"]


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


def test_the_figures_of_all_metrics_stand_in_one_place(run):
    found = run[1]["metrics"]
    assert list(found) == names()
    assert found["onset_f1"]["real"]["value"] == pytest.approx(run[1]["sync"]["real"]["f1"])
    assert found["frechet_video"]["sampled"]["value"] > 0
    assert found["silent_clips"]["real"]["value"] == 0
    assert found["loudness"]["real"]["count"] == NUM_CLIPS
    assert found["seed_diversity_video"]["sampled"]["note"].startswith("not measured: ")


@pytest.fixture(scope="module")
def of_two_ranks(dataset, codecs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    chosen = [name for name in names() if "frechet" not in name]
    return on_ranks(2, lambda world: sampled(world, dataset, codecs, directory, metrics=chosen))


def test_two_ranks_sample_the_same_clips(run, of_two_ranks):
    for summary in of_two_ranks:
        mine, theirs = summary["clips"], run[1]["clips"]
        assert [(c["key"], c["seed"]) for c in mine] == [(c["key"], c["seed"]) for c in theirs]
        assert [c["real"]["impacts"] for c in mine] == [c["real"]["impacts"] for c in theirs]


def test_two_ranks_make_the_figures_of_one(run, of_two_ranks):
    for summary in of_two_ranks:
        for name, found in summary["metrics"].items():
            assert found == run[1]["metrics"][name], name


def test_every_caption_is_sampled_by_as_many_seeds(dataset, codecs, tmp_path):
    few = {"clips": 2, "seeds": 2, "tolerance_ms": 50.0, "metrics": ["onset_f1", "seed_diversity_video", "motion"]}
    summary = on_ranks(1, lambda world: sampled(world, dataset, codecs, tmp_path, **few))[0]
    assert summary["count"] == 4
    assert [clip["seed"] for clip in summary["clips"]] == list(range(4))
    assert len({clip["key"] for clip in summary["clips"]}) == 2
    assert ["real" in clip for clip in summary["clips"]] == [True] * 2 + [False] * 2
    assert summary["sync"]["real"]["clips"] == 2
    assert summary["sync"]["sampled"]["tolerance_ms"] == 50
    assert summary["metrics"]["seed_diversity_video"]["sampled"]["value"] > 0
    assert summary["metrics"]["motion"]["sampled"]["count"] == 2, "an interval over clips, not over seeds"


@pytest.mark.parametrize(
    ("streams", "sizes"),
    [(Stream, [Bucket(2, 1, 1, 3), Bucket(16, 2, 1, 3)]), ([Stream.audio], [Bucket(0, 0, 0, 5), Bucket(0, 0, 0, 40)])],
    ids=["film", "sound alone"],
)
def test_ranks_run_the_same_modules_whatever_the_size_of_their_clips(codecs, tmp_path, streams, sizes):
    """The ranks of a sharded model gather weights together: with guidance in an interval of sigmas that follow the size,
    clips of two sizes side by side would guide at different steps. Seen as the rows that each forward holds."""
    write_latent_dataset(tmp_path / "data", [random_sample(f"{i}", sizes[i % 2]) for i in range(3)])
    dataset = open_dataset(tmp_path / "data")
    between = sum(float(shifted_schedule(3, size.schedule_tokens)[2]) for size in sizes) / 2
    guided = GuidanceConfig(cfg=3.0, sigma_low=between)
    profile = SamplerProfile(name="t", steps=3, schedule="shifted", tokens="actual", video=guided, audio=guided)

    def rows(world):
        seen = []

        def model(video, audio, perturbations=None):
            seen.append(len(audio.latent))
            return Velocity(*(None if one is None else one.latent for one in (video, audio)))

        config = SamplesConfig(clips=3, shown=0, batch_size=1, metrics=[])
        sampling = Sampling(profile=profile, negative=dataset.null_text, streams=frozenset(streams))
        made = Samples(dataset, sampling, codecs, config, world)
        summary = made.run(model, tmp_path / "out", step=3, weights="ema")
        assert summary["count"] == 3
        return seen

    first, second = on_ranks(2, rows)
    assert first == second
    assert len({tuple(first[i : i + 3]) for i in range(0, len(first), 3)}) == 2, "the sizes guide at different steps"


ORIGIN = {"checkpoint": "one"}
TWO = {"clips": 2, "batch_size": 1, "metrics": ["motion", "diversity_audio"]}


@pytest.fixture
def broken_off(dataset, codecs, tmp_path):
    """What an evaluation leaves that was killed in its second batch, beside the result of an older one."""
    (tmp_path / "samples.json").write_text('{"older": 1}')
    calls = 0

    def dies(video, audio, perturbations=None):
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return silent_model(video, audio)

    (world,) = on_ranks(1, lambda world: world)
    with pytest.raises(KeyboardInterrupt):
        samples(world, dataset, codecs, **TWO).run(dies, tmp_path, step=3, weights="ema", origin=ORIGIN)
    return tmp_path


def taken_up(world, dataset, codecs, directory, origin=ORIGIN, **settings):
    made = samples(world, dataset, codecs, **TWO | settings)
    return made.run(silent_model, directory, step=3, weights="ema", origin=origin), made.taken_up


def test_what_was_broken_off_is_taken_up_and_gives_what_it_would_have_given(broken_off, dataset, codecs, tmp_path):
    assert json.loads((broken_off / "samples.json").read_text()) == {"older": 1}, "nothing half-written stands there"
    whole = tmp_path / "whole"
    ((summary, found),) = on_ranks(1, lambda world: taken_up(world, dataset, codecs, broken_off))
    ((expected, none),) = on_ranks(1, lambda world: taken_up(world, dataset, codecs, whole))
    assert (found, none) == (1, 0)
    assert summary == expected == json.loads((broken_off / "samples.json").read_text())
    for path in whole.iterdir():
        assert (broken_off / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(broken_off.glob("unfinished-*"))


def test_what_is_taken_up_is_sampled_beside_the_same_clips(codecs, tmp_path, monkeypatch):
    """The bits of a sample depend on what is computed beside it; here, for all to see, on the mean of both."""
    write_latent_dataset(tmp_path / "data", [random_sample(f"{i}", Bucket(2, 1, 1, 5)) for i in range(3)])
    dataset = open_dataset(tmp_path / "data")

    def together(video, audio, perturbations=None):
        return Velocity(*(one.latent * (1 + one.latent.mean()) for one in (video, audio)))

    def made(place):
        settings = {"clips": 3, "batch_size": 2, "metrics": []}
        (world,) = on_ranks(1, lambda world: world)
        return samples(world, dataset, codecs, **settings).run(together, place, step=3, weights="ema", origin=ORIGIN)

    kept, keep = [], Unfinished.keep

    def killed(self, number, one):
        if len(kept) == 1:
            kept.append(None)
            raise KeyboardInterrupt
        keep(self, number, one)
        kept.append(number)

    monkeypatch.setattr(Unfinished, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "broken")
    resumed = made(tmp_path / "broken")
    assert kept == [0, None, 1, 2], "what was kept is not made again"
    assert resumed == made(tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("other", [{"origin": {"checkpoint": "two"}}, {"origin": None}, {"seed": 1}])
def test_samples_of_other_weights_or_settings_are_made_anew(broken_off, dataset, codecs, other):
    ((_, found),) = on_ranks(1, lambda world: taken_up(world, dataset, codecs, broken_off, **other))
    assert found == 0
    assert not list(broken_off.glob("unfinished-*"))


def test_a_second_evaluation_of_the_step_is_refused_and_spoils_nothing(broken_off, dataset, codecs):
    before = sorted(broken_off.rglob("*"))
    with locked(broken_off):
        refused = pytest.raises(ConfigError, match=r"another evaluation is writing there \(process 7 on host-a\)")
        (caught,) = on_ranks(1, lambda world: _caught(refused, world, dataset, codecs, broken_off))
    assert caught.agreed
    (broken_off / LOCK).unlink()
    assert sorted(broken_off.rglob("*")) == before


def _caught(refused, *args):
    with refused as caught:
        taken_up(*args, seed=1)
    return caught.value


def test_a_sample_whose_file_was_cut_is_made_again(broken_off, dataset, codecs, caplog):
    (kept,) = broken_off.glob("unfinished-*/*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    ((summary, found),) = on_ranks(1, lambda world: taken_up(world, dataset, codecs, broken_off))
    assert (summary["count"], found) == (2, 0)
    assert f"{kept.name} is not whole" in caplog.text


def test_media_of_an_earlier_evaluation_do_not_stay_beside_the_file_that_knows_nothing_of_them(
    dataset, codecs, tmp_path
):
    (tmp_path / "notes.txt").write_text("of the user")
    few = {"clips": 2, "metrics": []}
    on_ranks(1, lambda world: sampled(world, dataset, codecs, tmp_path, **few, shown=2))
    assert (tmp_path / "001-sampled.mp4").exists()
    on_ranks(1, lambda world: sampled(world, dataset, codecs, tmp_path, **few, shown=1))
    made = {f"000-{side}{end}" for side in ("sampled", "real") for end in (".mp4", "-strip.png", "-mel.png")}
    assert {path.name for path in tmp_path.iterdir()} == made | {"samples.json", "sheet.png", "notes.txt"}


def test_no_events_have_no_score():
    entries = [{side: {"impacts": [], "onsets": []} for side in ("sampled", "real")}] * 3
    found = sync_figures(entries, 0.08, [0, 1, 2])["sampled"]
    assert (found["f1"], found["low"], found["chance"]) == (None, None, None)


def test_seeds_of_a_clip_that_are_alike_say_no_more_than_one():
    """Six clips with an impact each at a time of its own; every second is heard."""
    entries = [
        {side: {"impacts": [i], "onsets": [i] if i % 2 else []} for side in ("sampled", "real")} for i in range(6)
    ]
    once, often = (sync_figures(entries * seeds, 0.08, [*range(6)] * seeds)["sampled"] for seeds in (1, 4))
    assert once["low"] < once["f1"] < once["high"]
    assert [often[name] for name in ("f1", "low", "high")] == [once[name] for name in ("f1", "low", "high")]
    assert (once["chance"], often["chance"]) == (0, 0), "no two clips agree"


def test_all_that_decides_a_sample_is_in_its_identity(dataset):
    given = {"streams": frozenset(Stream), "config": SamplesConfig(), "weights": "ema", "dtype": torch.float32}
    given["profile"] = SamplerProfile(name="two steps", steps=2)
    others = [
        {"weights": "raw"},
        {"dtype": torch.bfloat16},
        {"streams": frozenset({Stream.video})},
        {"profile": SamplerProfile(name="two steps", steps=3)},
        {"profile": SamplerProfile(name="same steps", steps=2)},
        *(
            {"config": SamplesConfig(**one)}
            for one in ({"clips": 2}, {"seed": 1}, {"seeds": 2}, {"tolerance_ms": 50.0})
        ),
    ]
    same, *different = [samples_identity(dataset, **given | other) for other in [{}, *others]]
    assert same == samples_identity(dataset, **given)
    for other, found in zip(others, different, strict=True):
        assert found != same, other


def test_samples_that_are_not_finite_are_refused_by_key(dataset, codecs, tmp_path):
    def diverged(video, audio, perturbations=None):
        return Velocity(video.latent * float("nan"), audio.latent)

    def failure(world):
        with pytest.raises(DataError, match="clip-0: the sampled video latents are not finite"):
            samples(world, dataset, codecs).run(diverged, tmp_path, step=3, weights="ema")
        return True

    assert on_ranks(1, failure) == [True]
    assert not (tmp_path / "samples.json").exists()


class Broken:
    """A codec that gives one number that is none, or none that is finite."""

    def __init__(self, codec, value):
        self.codec, self.value = codec, value

    def __getattr__(self, name):
        return getattr(self.codec, name)

    def decode(self, latents):
        decoded = self.codec.decode(latents).clone()
        decoded.flatten()[-1] = self.value
        return decoded


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["video", "audio"])
def test_what_a_codec_decodes_to_no_number_is_refused_by_stream_and_clip(dataset, codecs, tmp_path, name, value):
    broken = replace(codecs, **{name: Broken(getattr(codecs, name), value)})

    def failure(world):
        with pytest.raises(DataError, match=f"^clip-0, sampled: the {name} codec gave NaN or infinity"):
            sampled(world, dataset, broken, tmp_path, clips=1)
        return True

    assert on_ranks(1, failure) == [True]
    assert not (tmp_path / "samples.json").exists()


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


def test_sound_without_picture_is_asked_for_at_its_length():
    sample = random_sample("only-sound", Bucket(0, 0, 0, 4))
    assert request_like(sample, sample.text, 0).bucket == sample.bucket


@pytest.mark.parametrize(("stream", "bucket"), [(Stream.video, Bucket(2, 1, 1, 0)), (Stream.audio, Bucket(0, 0, 0, 9))])
def test_a_clip_is_asked_for_in_the_streams_that_were_trained(stream, bucket):
    sample = random_sample("both", Bucket(2, 1, 1, 9))
    assert request_like(sample, sample.text, 0, frozenset({stream})).bucket == bucket


def test_a_clip_without_a_trained_stream_is_refused_by_key():
    sample = random_sample("only-sound", Bucket(0, 0, 0, 4))
    with pytest.raises(DataError, match="only-sound has no video"):
        request_like(sample, sample.text, 0, frozenset({Stream.video}))


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
    for name, value in (("batch_size", 0), ("seeds", 0), ("tolerance_ms", 0.0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            SamplesConfig(**{name: value})
    with pytest.raises(ConfigError, match="fvd: not known"):
        SamplesConfig(metrics=["fvd"])
