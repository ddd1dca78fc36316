"""Metrics without outside weights: what they must say of sets whose answer is known."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from ltx2_train.cli import evaluate
from ltx2_train.codecs.dct import DctAudioCodec, DctVideoCodec
from ltx2_train.data.synthetic import bounce_clip
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.evals import metrics, sync
from ltx2_train.evals.estimate import Estimate, bootstrap, jackknife
from ltx2_train.evals.film import Film
from ltx2_train.evals.metrics import Clip, Part, Rows, Settings, build_metrics, figures, measure
from ltx2_train.evals.metrics.latents import features, frechet_distance, shrunk_covariance
from ltx2_train.evals.metrics.metric import PerClip
from ltx2_train.evals.metrics.sound import integrated_loudness

RATE = 16_000
NUM_CLIPS = 12


def clip(waveform=None, video=None, *, rate=RATE, fps=24.0, video_latents=None, audio_latents=None) -> Clip:
    waveform = None if waveform is None else torch.as_tensor(waveform, dtype=torch.float32)
    return Clip(Film(video, waveform, fps, rate), video_latents, audio_latents)


def estimated(name: str, sampled: list[Clip], real: list[Clip] | None = None, clips=None, **settings) -> dict:
    """The figure of one metric, as samples.json has it."""
    built = build_metrics([name], Settings(**settings))
    rows = [[measure(built, one) for one in some] for some in (sampled, sampled if real is None else real)]
    return figures(built, *rows, range(len(sampled)) if clips is None else clips)[name]


def sine(hz: float, *, rate: int = RATE, seconds: float = 3.0, amplitude: float = 1.0) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)


# -- sound -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100, 48_000])
def test_loudness_of_the_recommendations_sine(rate):
    """ITU-R BS.1770-4: 997 Hz at 0 dBFS in one front channel is -3.01 LUFS; in both it is 3.01 LU louder."""
    tone = sine(997, rate=rate)
    assert integrated_loudness(np.stack([tone, 0 * tone]), rate) == pytest.approx(-3.01, abs=0.02)
    assert integrated_loudness(np.stack([tone, tone]), rate) == pytest.approx(0.0, abs=0.02)
    assert integrated_loudness(np.stack([tone, tone]) / 10, rate) == pytest.approx(-20.0, abs=0.02)


def test_loudness_weighs_low_tones_less_and_high_ones_more():
    low, middle, high = (integrated_loudness(sine(hz, rate=48_000)[None], 48_000) for hz in (40, 997, 8000))
    assert low < middle - 5
    assert high > middle + 3


def test_loudness_leaves_silence_out():
    """A tone and as long a silence are as loud as the tone, but for the blocks on the border; ungated, 3 LU less."""
    tone = sine(997, amplitude=0.1)
    with_silence = np.concatenate([tone, np.zeros(3 * RATE)])
    alone, both = (integrated_loudness(x[None], RATE) for x in (tone, with_silence))
    assert both == pytest.approx(alone, abs=0.3)
    assert integrated_loudness(np.zeros((2, RATE)), RATE) is None
    assert integrated_loudness(np.ones((2, RATE // 4)), RATE) is None, "shorter than a block"


@pytest.mark.parametrize(("quieter", "counts"), [(5, True), (11, True), (14, False)])
def test_loudness_leaves_out_what_is_far_below_the_rest(quieter, counts):
    """A tone and as long a quieter one: the mean power, unless that one is 10 LU below the mean (3 below the tone)."""
    share = 10 ** (-quieter / 10)
    tone = sine(997, amplitude=0.1)
    alone, both = (integrated_loudness(x[None], RATE) for x in (tone, np.concatenate([tone, share**0.5 * tone])))
    assert both - alone == pytest.approx(10 * math.log10((1 + share) / 2) if counts else 0, abs=0.3)


def test_silence_is_counted_in_time_and_in_clips():
    quiet, loud = np.zeros((2, RATE)), np.stack([sine(440, seconds=1.0)] * 2)
    half = np.concatenate([loud, quiet], axis=1)
    clips = [clip(quiet), clip(loud), clip(half)]
    assert estimated("silence", clips)["sampled"]["value"] == pytest.approx(2 / 4)
    assert estimated("silent_clips", clips)["sampled"]["value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("amplitude", "share"), [(0.0009, 1.0), (0.0011, 0.0)])
def test_silence_begins_at_60_db_below_full_scale(amplitude, share):
    assert estimated("silence", [clip(np.full((2, RATE), amplitude))])["sampled"]["value"] == share


def test_clipping_is_the_share_of_samples_at_full_scale():
    wave = np.zeros((2, 1000))
    wave[0, :30], wave[1, :20], wave[1, 20] = 1.0, -1.0, 0.999
    assert estimated("clipping", [clip(wave)])["sampled"]["value"] == pytest.approx(50 / 2000)


def test_a_silent_set_has_no_loudness_and_a_mute_one_has_no_sound_figures():
    silent = estimated("loudness", [clip(np.zeros((2, RATE)))] * 3)["sampled"]
    assert silent["value"] is None
    assert silent["note"] == "not measured: no clip has sound that it can be measured on"
    for name in metrics.names():
        found = estimated(name, [clip(None, torch.zeros(3, 9, 8, 8))])
        json.dumps(found, allow_nan=False)
        if name != "motion":
            assert found["sampled"]["note"].startswith("not measured: no clip has "), name


# -- picture and time --------------------------------------------------------------------------------------------------


def test_motion_is_the_change_between_frames():
    still, blinking = torch.zeros(3, 9, 8, 8), torch.ones(3, 9, 8, 8)
    blinking[:, ::2] = -1
    assert estimated("motion", [clip(None, still)])["sampled"]["value"] == 0
    assert estimated("motion", [clip(None, blinking)])["sampled"]["value"] == 100


@pytest.fixture(scope="module")
def bounces() -> list[Clip]:
    """Clips of the bounce world with their latents."""
    video_codec, audio_codec = DctVideoCodec(), DctAudioCodec()
    found = []
    for i in range(NUM_CLIPS):
        made = bounce_clip(4_000_000_000 + i)
        video = torch.from_numpy(made.video).permute(3, 0, 1, 2).float() / 127.5 - 1
        waveform = torch.from_numpy(made.waveform).float()
        latents = video_codec.encode(video[None])[0], audio_codec.encode(waveform[None], RATE)[0]
        found.append(Clip(Film(video, waveform, made.fps, RATE), *latents))
    return found


def later(one: Clip, seconds: float) -> Clip:
    """The clip whose sound comes later; what is pushed out at the end is lost."""
    shift, waveform = round(seconds * RATE), one.film.waveform
    delayed = torch.cat([torch.zeros(2, shift), waveform[:, : waveform.shape[1] - shift]], dim=1)
    return Clip(Film(one.film.video, delayed, one.film.fps, RATE))


def test_sound_that_comes_later_and_later_is_less_and_less_in_step(bounces):
    values = {name: [] for name in ("onset_f1", "sync_peaks_f1", "sync_correlation", "sync_lag")}
    for delay in (0.0, 0.04, 0.12, 0.4):
        delayed = [later(one, delay) for one in bounces]
        for name, series in values.items():
            series.append(estimated(name, delayed, tolerance=0.1)["sampled"]["value"])
    print(values)
    assert values["onset_f1"][0] > 0.9
    for name in ("onset_f1", "sync_correlation"):
        assert values[name] == sorted(values[name], reverse=True), name
    assert values["sync_correlation"][0] > values["sync_correlation"][1] > values["sync_correlation"][2]
    assert values["sync_lag"] == sorted(set(values["sync_lag"])), "each above the one before"
    assert values["sync_lag"][3] - values["sync_lag"][0] == pytest.approx(400, abs=60)
    assert values["sync_peaks_f1"][0] > values["sync_peaks_f1"][2] > values["sync_peaks_f1"][3]


def test_the_tolerance_decides_what_counts_as_one_event(bounces):
    delayed = [later(one, 0.06) for one in bounces]
    wide, narrow = (estimated("onset_f1", delayed, tolerance=t)["sampled"]["value"] for t in (0.08, 0.03))
    assert wide > 0.8
    assert narrow < 0.2
    video, wave = torch.full((3, 49, 16, 16), -1.0), torch.zeros(2, 2 * RATE)
    video[:, 24:] = 1.0
    wave[:, round(1.05 * RATE) :][:, :400] = torch.from_numpy(sine(1000, seconds=400 / RATE)).float()
    found = [estimated("sync_peaks_f1", [clip(wave, video)], tolerance=t)["sampled"]["value"] for t in (0.08, 0.02)]
    assert found == [1, 0], "a light at 1 s and a click 50 ms later"


def test_the_lag_of_a_flash_and_a_click_is_their_distance():
    """Any footage: a frame that lights up, and a click a quarter of a second later."""
    video, wave = torch.full((3, 49, 16, 16), -1.0), torch.zeros(2, 2 * RATE)
    video[:, 24] = 1.0
    wave[:, round(1.25 * RATE) :][:, :400] = torch.from_numpy(sine(1000, seconds=400 / RATE)).float()
    found = estimated("sync_lag", [clip(wave, video)])["sampled"]
    assert found["value"] == pytest.approx(250, abs=35)
    assert found["note"] == "one clip: no interval"
    both = sync.curves(sync.motion_energy(video), sync.onset_strength(wave, RATE), 24.0)
    assert sync.lag(both) > 0, "the sound comes late"


# -- latents -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_equal_sets_are_at_no_distance_and_others_are(bounces, stream):
    def distance(change) -> float:
        other = [with_latents(one, stream, change) for one in bounces]
        return frechet_distance(*(np.stack([features(one, stream) for one in some]) for some in (other, bounces)))

    assert distance(lambda x: x) < 1e-6
    assert distance(lambda x: x + 0.1) == pytest.approx(128 * 0.01, rel=1e-3)
    assert distance(lambda x: x.mean(dim=1, keepdim=True).expand_as(x)) > 0.1, "the same mean, and nothing moves"
    found = estimated(f"frechet_{stream}", bounces, bounces)
    assert found["sampled"]["value"] < 1e-6
    assert "real" not in found


def with_latents(one: Clip, stream: str, change) -> Clip:
    latents = {f"{name}_latents": getattr(one, f"{name}_latents") for name in ("video", "audio")}
    latents[f"{stream}_latents"] = change(latents[f"{stream}_latents"])
    return Clip(one.film, **latents)


def normal_rows(rng, num: int, width: int = 24) -> np.ndarray:
    """Rows of correlated normal numbers whose variances lie orders apart."""
    mix = np.random.default_rng(5).standard_normal((width, width)) / np.sqrt(width)
    return rng.standard_normal((num, width)) @ mix * np.logspace(-1, 1, width)


def test_the_distance_is_that_of_the_formula_where_clips_are_plenty():
    """Two normal distributions of one covariance are as far apart as their means."""
    rng = np.random.default_rng(0)
    first, second = normal_rows(rng, 20_000), normal_rows(rng, 20_000) + 0.5
    assert frechet_distance(first, second) == pytest.approx(24 * 0.25, rel=0.1)
    assert frechet_distance(first, 2 * first) == pytest.approx(
        np.square(first.mean(axis=0)).sum() + np.trace(np.cov(first.T)), rel=0.01
    )


def test_the_distance_is_symmetric_and_moving_both_sets_changes_nothing():
    rng = np.random.default_rng(1)
    first, second = normal_rows(rng, 10), 1.4 * normal_rows(rng, 15)
    forth, back = frechet_distance(first, second), frechet_distance(second, first)
    assert forth == pytest.approx(back, rel=1e-9)
    assert frechet_distance(first + 3, second + 3) == pytest.approx(forth, rel=1e-9)


def test_a_covariance_of_few_rows_is_nearer_to_the_truth_when_shrunk():
    rng = np.random.default_rng(2)
    truth, rows = np.cov(normal_rows(rng, 100_000).T), normal_rows(rng, 12)
    shrunk, plain = shrunk_covariance(rows), np.cov(rows.T)
    np.testing.assert_allclose(np.diag(shrunk), np.diag(plain))
    assert np.linalg.norm(shrunk - truth) < np.linalg.norm(plain - truth)
    assert np.linalg.eigvalsh(shrunk).min() > 1e-6 > np.linalg.eigvalsh(plain).min()


def test_the_shrinkage_is_the_share_of_a_correlation_that_is_chance():
    """By hand: r = 2 / sqrt 5 and, by the four products of standardised numbers, var r = 1 / 15; so 1 / 12 is chance."""
    rows = np.array([[1.0, 3.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -3.0]])
    covariance = 8 / 3 * (1 - 1 / 12)
    np.testing.assert_allclose(shrunk_covariance(rows), [[4 / 3, covariance], [covariance, 20 / 3]])


def test_a_channel_that_never_changes_breaks_nothing():
    rows = normal_rows(np.random.default_rng(3), 12)
    rows[:, 4] = 1.0
    assert frechet_distance(rows, rows) < 1e-6


def test_few_clips_are_warned_of(bounces):
    note = estimated("frechet_video", bounces, bounces)["sampled"]["note"]
    assert note == "12 clips of 512 wanted: compare with figures of as many only"
    assert "few clips" in estimated("motion", bounces)["sampled"]["note"]


def test_diversity_tells_prompts_from_seeds():
    """Three captions 3 apart, two seeds of each 1 apart: distances of one number in 128 channels' means."""

    def at(place: float) -> Clip:
        latents = torch.zeros(128, 2, 1, 1)
        latents[0] = place
        return clip(None, torch.zeros(3, 9, 8, 8), video_latents=latents)

    sampled = [at(caption * 30 + seed) for seed in (0, 1) for caption in range(3)]
    clips = [0, 1, 2] * 2
    assert estimated("seed_diversity_video", sampled, clips=clips, real=sampled[:3])["sampled"]["value"] == 1
    between = estimated("diversity_video", sampled, clips=clips, real=sampled[:3])
    assert between["sampled"]["value"] == pytest.approx((30 + 30 + 60) / 3, abs=0.1)
    assert between["real"]["value"] == pytest.approx((30 + 30 + 60) / 3)
    alike = estimated("diversity_video", [at(1.0)] * 6, clips=clips, real=sampled[:3])
    assert alike["sampled"]["value"] == 0
    assert "sample several seeds" in estimated("seed_diversity_video", sampled[:3])["sampled"]["note"]


def test_one_distance_has_no_interval(bounces):
    found = estimated("diversity_video", bounces[:2])["sampled"]
    assert found["value"] > 0
    assert (found["low"], found["high"], found["count"]) == (None, None, 2)
    assert found["note"] == "too few clips: no interval"
    assert estimated("frechet_video", bounces[:2], bounces[:2])["sampled"]["note"].startswith("2 clips of 512 wanted")
    of_three = jackknife(lambda rows: float(len(rows)) if len(rows) > 2 else math.nan, [0, 1, 2])
    assert of_three.note == "too few clips: no interval"


# -- figures and their intervals ---------------------------------------------------------------------------------------


def test_an_interval_of_the_mean_holds_the_truth_nineteen_times_of_twenty():
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(60):
        values = rng.exponential(size=40)
        found = bootstrap(lambda rows, values=values: float(values[rows].mean()), range(40))
        held += found.low <= 1.0 <= found.high
    assert 51 <= held <= 59


def test_an_interval_of_a_mean_is_as_wide_as_the_normal_one_where_clips_are_many():
    values = np.random.default_rng(8).standard_normal(400)
    found = bootstrap(lambda rows: float(values[rows].mean()), range(400))
    assert found.half_width == pytest.approx(NormalDist().inv_cdf(0.975) * values.std() / 20, rel=0.08)


def test_leaving_out_one_clip_at_a_time_gives_the_standard_error_of_a_mean():
    """Of 0, 0, 0 and 8 that is 2; a distance is not below 0."""
    found = jackknife(lambda rows: float(np.array([0.0, 0, 0, 8])[rows].mean()), range(4))
    assert (found.value, found.low) == (2, 0)
    assert found.high == pytest.approx(2 + 2 * NormalDist().inv_cdf(0.975), rel=1e-4)


@pytest.mark.parametrize("interval", [bootstrap, jackknife])
def test_a_warning_of_few_clips_does_not_count_their_seeds(interval):
    notes = [interval(lambda rows: float(rows.mean()), [*range(num)] * 3).note for num in (10, 20)]
    assert notes == ["few clips: the interval is rough under 20", ""]


def test_samples_of_one_clip_are_drawn_together():
    """Five seeds that give the same value are no more than one."""
    values = np.random.default_rng(6).standard_normal(30)
    once = bootstrap(lambda rows: float(values[rows].mean()), range(30))
    repeated, clips = np.tile(values, 5), list(range(30)) * 5
    again = bootstrap(lambda rows: float(repeated[rows].mean()), clips)
    assert (again.low, again.high, again.count) == pytest.approx((once.low, once.high, 30))
    fewer = bootstrap(lambda rows: float(repeated[rows].mean()), clips[:-1])
    assert (fewer.low, fewer.high, fewer.count) == pytest.approx((once.low, once.high, 30), abs=0.05)


def test_the_interval_of_a_distance_is_as_wide_as_new_sets_scatter():
    """Where the bootstrap of the same distance lies far above it: a clip drawn twice looks like structure."""
    rng = np.random.default_rng(7)

    def distance(values):
        return lambda rows: frechet_distance(values[rows[rows < 48]], values[rows[rows >= 48]])

    clips = list(range(48)) * 2
    scatter = np.std([distance(normal_rows(rng, 96))(np.arange(96)) for _ in range(40)])
    found = [jackknife(distance(normal_rows(rng, 96)), clips) for _ in range(5)]
    widths = [one.high - one.value for one in found]
    assert 0.4 < np.mean(widths) / (1.96 * scatter) < 2.5
    resampled = bootstrap(distance(normal_rows(rng, 96)), clips)
    assert resampled.low > resampled.value


@dataclass(frozen=True)
class Brightness:
    """A metric as one would join: the mean of the picture, and how far it lies from the real one's."""

    device: torch.device
    name: str = "brightness"
    unit: str = "of 1"
    needs: frozenset[Part] = frozenset({Part.motion})
    compares: bool = True

    def measure(self, clip: Clip) -> list[float]:
        return [float(clip.film.video.to(self.device).mean())]

    def summarise(self, rows: Rows, real: Rows) -> Estimate:
        aim = real.values.mean()
        return bootstrap(lambda drawn: float(abs(rows.values[drawn].mean() - aim)), rows.clips)


@pytest.fixture
def joined(monkeypatch):
    monkeypatch.setattr(metrics, "_BUILDERS", dict(metrics._BUILDERS))
    metrics.register("brightness", lambda settings: Brightness(settings.device))


@pytest.mark.usefixtures("joined")
def test_a_metric_from_outside_joins_by_its_name():
    bright, dark = ([clip(None, torch.full((3, 9, 8, 8), value))] * 3 for value in (0.5, 0.1))
    found = estimated("brightness", bright, dark)
    assert found["unit"] == "of 1"
    assert found["sampled"]["value"] == pytest.approx(0.4)
    assert "brightness" in metrics.names()
    with pytest.raises(ConfigError, match="brightness.*there already"):
        metrics.register("brightness", lambda settings: Brightness(settings.device))


def test_the_example_of_the_documentation_runs(monkeypatch):
    """With a network that gives mean and contrast of a picture in the place of weights that are not here."""

    class Network:
        def to(self, device):
            return self

        def __call__(self, video):
            return torch.stack([video.mean(dim=(1, 2, 3, 4)), video.std(dim=(1, 2, 3, 4))], dim=1)

    monkeypatch.setattr(metrics, "_BUILDERS", dict(metrics._BUILDERS))
    monkeypatch.setattr(torch.jit, "load", lambda path: Network())
    monkeypatch.setattr(evaluate, "main", lambda: 0)
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    with pytest.raises(SystemExit):
        exec(page.split("```python\n")[1].split("```")[0], {})
    generator = torch.Generator().manual_seed(0)
    clips = [clip(None, torch.randn(3, 9, 8, 8, generator=generator).clamp(-1, 1)) for _ in range(6)]
    brighter = [clip(None, one.film.video + 1) for one in clips]
    assert estimated("fvd", clips, clips)["sampled"]["value"] < 1e-6
    assert estimated("fvd", brighter, clips)["sampled"]["value"] == pytest.approx(1, rel=1e-3)


def test_unknown_names_are_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match="fvd: not known. Choose from frechet_video"):
        build_metrics(["fvd"], Settings())
    with pytest.raises(ConfigError, match="twice"):
        build_metrics(["motion", "motion"], Settings())


def test_a_number_that_is_not_finite_is_an_error_and_not_a_figure():
    broken = PerClip(name="broken", unit="", needs=frozenset(), of=lambda clip: float("nan"))
    with pytest.raises(DataError, match="broken gave .*nan.* must be a finite number"):
        measure([broken], clip(None))
