"""Held-out loss: fixed clips, noise and sigmas, the same numbers however the work is shared."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from ltx2_train.data.datasets import open_dataset
from ltx2_train.diffusion.objective import Objective, ObjectiveConfig
from ltx2_train.errors import ConfigError, DataError, Ltx2Error
from ltx2_train.evals.estimate import Estimate
from ltx2_train.evals.heldout import (
    Heldout,
    HeldoutConfig,
    HeldoutLosses,
    by_bucket,
    heldout_evaluator,
    heldout_path,
    paired_change,
    spread,
)
from ltx2_train.model.modality import Velocity
from ltx2_train.record import Bucket
from ltx2_train.testing.shards import random_sample, write_latent_dataset
from ltx2_train.testing.threads import on_ranks

SOUND, SILENT = Bucket(2, 1, 1, 3), Bucket(2, 1, 1, 0)


class LinearModel:
    """Velocity = factor * latent; counts how often it is asked."""

    def __init__(self, factor: float = 0.5):
        self.factor, self.calls = factor, 0

    def __call__(self, video, audio, perturbations=None):
        self.calls += 1
        return Velocity(video.latent * self.factor, audio.latent * self.factor)


@pytest.fixture
def dataset(tmp_path):
    samples = [random_sample(f"clip-{i}", SILENT if i % 4 == 3 else SOUND) for i in range(11)]
    write_latent_dataset(tmp_path / "data", samples)
    return open_dataset(tmp_path / "data")


def measured(dataset, world, model=None, dtype=torch.float32, **settings):
    objective = Objective(ObjectiveConfig(), None, keyframe_marker=False)
    config = HeldoutConfig(**{"clips": 11, "batch_size": 2, "sigmas": [0.2, 0.8]} | settings)
    return Heldout(dataset, objective, config, world, dtype).measure(model or LinearModel())


def on_one_rank(dataset, **settings):
    return on_ranks(1, lambda world: measured(dataset, world, **settings))[0]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_any_number_of_ranks_gives_the_same_numbers(dataset, size):
    alone = on_one_rank(dataset).to_dict()
    for shared in on_ranks(size, lambda world: measured(dataset, world)):
        assert shared.to_dict() == alone


def test_ranks_that_share_samples_count_them_once(dataset):
    alone = on_one_rank(dataset).to_dict()
    for shared in on_ranks(4, lambda world: measured(dataset, world), sequence=2):
        assert shared.to_dict() == alone


def test_all_ranks_run_the_model_equally_often(dataset):
    models = [LinearModel() for _ in range(4)]
    on_ranks(4, lambda world: measured(dataset, world, models[world.rank]))
    assert len({model.calls for model in models}) == 1


@pytest.mark.parametrize("size", [1, 3])
def test_a_clip_that_one_rank_cannot_read_is_told_to_all_before_the_model_runs(tmp_path, size):
    samples = [random_sample(f"clip-{i}", SOUND) for i in range(6)]
    write_latent_dataset(tmp_path, samples)
    hurt = open_dataset(tmp_path)
    shard = next(tmp_path.glob("*.tar"))
    raw = bytearray(shard.read_bytes())
    raw[int(hurt.index.tensors_offset[4]) + int(hurt.index.tensors_size[4]) - 4] ^= 0xFF
    shard.write_bytes(raw)
    model = LinearModel()

    def failure(world):
        with pytest.raises(DataError, match="clip-4: damaged record") as caught:
            measured(hurt, world, model, clips=6, batch_size=1)
        return caught.value

    failures = on_ranks(size, failure)
    assert [error.agreed for error in failures] == [True] * size
    assert len({str(error) for error in failures}) == 1
    assert model.calls == 0


def test_a_result_that_cannot_be_written_is_told_to_all(dataset, tmp_path):
    (tmp_path / "evals").write_text("in the way")

    def failure(world):
        heldout = Heldout(dataset, Objective(ObjectiveConfig(), None, False), HeldoutConfig(clips=2), world)
        with pytest.raises(Ltx2Error, match="FileExistsError|NotADirectoryError") as caught:
            heldout_evaluator(heldout, tmp_path)(LinearModel(), 7)
        return caught.value.agreed

    assert on_ranks(2, failure) == [True, True]


def test_a_clip_is_noised_alike_whatever_stands_beside_it(dataset):
    alone, together = on_one_rank(dataset, batch_size=1), on_one_rank(dataset, batch_size=8)
    torch.testing.assert_close(alone.video, together.video, equal_nan=True)


def test_the_noise_of_a_clip_is_drawn_on_the_cpu_whatever_device_it_is_wanted_on(dataset):
    """Streams of a seed differ by device. None can be drawn on the meta device, and what is wanted there comes to it."""
    places = []

    class Elsewhere(Objective):
        def __call__(self, model, batch, rng, *, sigma):
            places.append(rng.normal("noise.video", (2, 3), torch.device("meta")).device.type)
            return super().__call__(model, batch, rng, sigma=sigma)

    heldout = partial(Heldout, dataset, Elsewhere(ObjectiveConfig(), None, False), HeldoutConfig(clips=2))
    on_ranks(1, lambda world: heldout(world).measure(LinearModel()))
    assert set(places) == {"meta"}


def test_measurements_in_another_precision_are_not_compared(dataset):
    first, second = (on_one_rank(dataset, dtype=dtype).to_dict() for dtype in (torch.float32, torch.bfloat16))
    assert (first["identity"]["dtype"], second["identity"]["dtype"]) == ("float32", "bfloat16")
    assert paired_change(first, second, "video") is None


def test_another_seed_is_another_noise(dataset):
    first, second = (on_one_rank(dataset, seed=seed).video for seed in (0, 1))
    assert (first != second).all()


def test_clips_that_are_alike_have_each_a_noise_of_its_own(tmp_path):
    alike = random_sample("0", SOUND)
    write_latent_dataset(tmp_path, [replace(alike, key=f"{i}") for i in range(4)])
    losses = on_one_rank(open_dataset(tmp_path))
    for values in (losses.video, losses.audio):
        assert len(set(values[:, 0].tolist())) == 4


def test_a_clip_without_sound_has_no_audio_loss(dataset):
    losses = on_one_rank(dataset)
    silent = [key in ("clip-3", "clip-7") for key in losses.keys]
    assert losses.audio.isnan().all(dim=1).tolist() == silent
    assert not losses.video.isnan().any()
    assert losses.mean("audio").count == 9
    assert losses.mean("video").count == 11


def test_the_loss_is_that_of_the_stated_sigma(tmp_path):
    """A model that gives no velocity at all has the loss of noise - clean: 2 for standard normal latents."""
    write_latent_dataset(tmp_path, [random_sample(f"{i}", Bucket(4, 2, 2, 20)) for i in range(8)])
    losses = on_one_rank(open_dataset(tmp_path), model=LinearModel(0.0))
    assert losses.mean("video").value == pytest.approx(2.0, rel=0.1)


def test_the_loss_of_a_clip_is_the_mean_over_its_sigmas():
    losses = torch.tensor([[1.0, 3.0], [2.0, 6.0]], dtype=torch.float64)
    plain = HeldoutLosses(("a", "b"), (0.2, 0.8), losses, losses).to_dict()["video"]
    assert plain["per_clip"] == [2, 4]
    assert plain["mean"]["mean"] == 3
    assert [row["mean"] for row in plain["by_sigma"]] == [1.5, 4.5]


def test_better_weights_are_told_from_worse_by_paired_clips(dataset):
    worse, better = (on_one_rank(dataset, model=LinearModel(f)).to_dict() for f in (0.5, 0.45))
    change = paired_change(worse, better, "video")
    assert change is not None
    assert change.high < 0
    width = better["video"]["mean"]["high"] - better["video"]["mean"]["low"]
    assert change.high - change.low < width


def test_a_clip_that_diverged_is_not_left_out_of_a_pair():
    """Two clips got better and one has no finite loss: no change may be told. A clip without sound is another matter."""

    def measured(video: list[float], audio: list[float]) -> dict:
        columns = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (video, audio))
        return HeldoutLosses(("a", "b", "c"), (0.5,), *columns).to_dict()

    before = measured([1.0, 1.0, 1.0], [1.0, 1.0, math.nan])
    after = measured([0.5, 0.5, math.inf], [0.5, 0.5, math.nan])
    for pair, which in (((before, after), "later"), ((after, before), "first")):
        change = paired_change(*pair, "video")
        assert change.value is None
        assert change.note == f"not measured: the {which} loss is not finite in 1 of 3 clips"
    assert paired_change(before, after, "audio").value == -0.5


def test_measurements_of_other_sigmas_are_not_compared(dataset):
    first, second = on_one_rank(dataset).to_dict(), on_one_rank(dataset, sigmas=[0.5]).to_dict()
    assert paired_change(first, second, "video") is None


def test_measurements_of_other_clips_are_not_compared_whatever_their_names(dataset, tmp_path):
    """Keys such as clip-000001 come in every dataset."""
    samples = [dataset.read(i) for i in range(len(dataset))]
    write_latent_dataset(tmp_path / "other", [replace(sample, video=3 * sample.video) for sample in samples])
    write_latent_dataset(tmp_path / "copy", samples)
    first = on_one_rank(dataset).to_dict()
    other, copy = (on_one_rank(open_dataset(tmp_path / name)).to_dict() for name in ("other", "copy"))
    assert (first["keys"], first["sigmas"]) == (other["keys"], other["sigmas"])
    assert paired_change(first, other, "video") is None
    assert paired_change(first, copy, "video").value == 0, "wherever they lie"
    assert paired_change(first, on_one_rank(dataset, seed=1).to_dict(), "video") is None, "other noise"
    unknown = {name: value for name, value in first.items() if name != "identity"}
    assert paired_change(first, unknown, "video") is None
    assert json.loads(json.dumps(first))["identity"] == first["identity"], "it comes back as it was"


def test_one_evaluation_measures_raw_and_averaged_weights_and_writes_both_at_once(dataset, tmp_path):
    """The model has the average; the block puts the trained weights there, and takes them out again."""
    model = LinearModel(0.5)

    @contextmanager
    def raw():
        model.factor = 0.7
        yield
        model.factor = 0.5

    def evaluate(world):
        heldout = Heldout(dataset, Objective(ObjectiveConfig(), None, False), HeldoutConfig(clips=2), world)
        return heldout_evaluator(heldout, tmp_path, others={"raw": raw})(model, 7), heldout.num_forwards

    (event, forwards), expected = on_ranks(1, evaluate)[0], {}
    for name, factor in (("raw", 0.7), ("ema", 0.5)):
        expected[name] = measured_alone(dataset, factor).figures()
    written = json.loads(heldout_path(tmp_path, 7).read_text())
    assert set(written) == {"step", "raw", "ema"}
    assert {m: event[f"loss_{m}"] for m in ("video", "audio")} == {
        m: written["ema"][m]["mean"]["mean"] for m in ("video", "audio")
    }
    assert event["raw"] == expected["raw"]
    assert {name: event[name] for name in expected["ema"]} == expected["ema"]
    assert event["raw"] != expected["ema"]
    assert event["forwards"] == model.calls == 2 * forwards


def measured_alone(dataset, factor):
    settings = {"clips": 2, "batch_size": 8, "sigmas": HeldoutConfig().sigmas}
    return on_ranks(1, lambda world: measured(dataset, world, LinearModel(factor), **settings))[0]


@pytest.mark.parametrize(
    ("modality", "other", "note"),
    [("video", "audio", "not finite in 2 of 11 clips"), ("audio", "video", "not finite in 1 of 9 clips")],
)
def test_a_loss_that_is_not_finite_is_told_and_not_left_out(dataset, modality, other, note):
    """Of the first of each bucket, one of sound and one of silent clips."""

    class Diverged(LinearModel):
        def __call__(self, video, audio, perturbations=None):
            found = super().__call__(video, audio)
            getattr(found, modality)[0] = math.nan
            return found

    losses = on_one_rank(dataset, model=Diverged(), batch_size=11)
    assert (losses.mean(modality).value, losses.mean(modality).note) == (None, note)
    assert losses.mean(other).value is not None
    json.dumps(losses.to_dict(), allow_nan=False)


def test_an_interval_holds_the_mean_and_shrinks_with_more_clips():
    few, many = Estimate.mean_of(torch.randn(10).abs()), Estimate.mean_of(torch.randn(1000).abs())
    assert few.low < few.value < few.high
    assert many.half_width < few.half_width
    assert (few.note, many.note) == ("few clips: the interval is rough under 20", "")


def test_an_interval_of_few_clips_is_that_of_students_t():
    """Quantiles in closed form: for two values the Cauchy distribution's, for three (2p - 1) / sqrt(2p (1 - p))."""
    two, three = (Estimate.mean_of(torch.arange(num)) for num in (2, 3))
    assert two.half_width == pytest.approx(math.tan(math.pi * 0.475) / 2)
    assert three.half_width == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3))


@pytest.mark.parametrize("num", [2, 4, 8, 16])
def test_an_interval_holds_the_truth_nineteen_times_of_twenty_however_few_the_clips(num):
    found = [
        Estimate.mean_of(values) for values in torch.randn(1000, num, generator=torch.Generator().manual_seed(num))
    ]
    assert sum(one.low <= 0 <= one.high for one in found) == pytest.approx(950, abs=20)


def test_one_clip_has_a_mean_and_no_interval():
    plain = Estimate.mean_of(torch.tensor([1.0, math.nan])).to_dict()
    assert plain == {"value": 1.0, "low": None, "high": None, "count": 1, "note": "one clip: no interval"}


def test_clips_are_spread_over_the_split_and_grouped_by_bucket():
    assert spread(100, 4, "data") == [0, 25, 50, 75]
    assert spread(3, 8, "data") == [0, 1, 2]
    groups = by_bucket(range(5), lambda i: SILENT if i % 2 else SOUND, 2)
    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3], [4]]


def test_an_empty_split_and_a_bad_sigma_are_named():
    with pytest.raises(DataError, match="some/split"):
        spread(0, 4, "some/split")
    with pytest.raises(ConfigError, match="sigmas"):
        HeldoutConfig(sigmas=[0.0])
