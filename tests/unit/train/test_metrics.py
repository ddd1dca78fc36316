from dataclasses import dataclass, replace

import pytest
import torch

from ltx2_train.batch import collate, placeholder
from ltx2_train.record import Bucket, TextFeatures
from ltx2_train.train.metrics import SIGMA_BINS, Metrics, lag


@dataclass
class World:
    rank: int = 0
    size: int = 1
    counts_samples: bool = True

    def all_sum(self, tensor):
        return tensor


class Pair(World):
    """Two ranks in one process: the second's tensor is added to the first's."""

    def __init__(self, rank, other=None):
        super().__init__(rank, 2)
        self.other, self.sent = other, None

    def all_sum(self, tensor):
        self.sent = tensor.clone()
        return tensor + self.other.sent if self.other else tensor


@dataclass
class Losses:
    video: torch.Tensor
    audio: torch.Tensor
    has_video: torch.Tensor
    has_audio: torch.Tensor
    sigma_video: torch.Tensor
    sigma_audio: torch.Tensor
    weight_video: float = 1.0
    weight_audio: float = 0.5


def losses(video, audio, has_video, has_audio, sigma):
    return Losses(*(torch.tensor(x) for x in (video, audio, has_video, has_audio, sigma, sigma)))


FIRST = losses([1.0, 2.0], [4.0, 8.0], [1.0, 1.0], [1.0, 0.0], [0.05, 0.55])
SECOND = losses([6.0, 9.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.51])


def closed(metrics):
    metrics.record_step(seconds=2.0, data_seconds=0.5, grad_norm=3.0, lr=0.1)
    return metrics


def test_losses_are_means_over_samples_that_count_not_over_micro_batches():
    metrics = Metrics(World())
    metrics.record_losses(FIRST)
    metrics.record_losses(SECOND)
    record = closed(metrics).flush()
    assert record["loss_video"] == pytest.approx((1 + 2 + 6) / 3)
    assert record["loss_audio"] == pytest.approx((4 + 1 + 1) / 3)
    assert record["loss"] == pytest.approx(3.0 + 0.5 * 2.0)
    assert (record["grad_norm"], record["lr"]) == (3.0, 0.1)


def test_every_counted_sample_falls_into_the_bin_of_its_sigma():
    metrics = Metrics(World())
    metrics.record_losses(FIRST)
    metrics.record_losses(SECOND)
    bins = closed(metrics).flush()["sigma_bins"]
    assert len(bins["video"]) == len(bins["audio"]) == SIGMA_BINS
    assert bins["video"][0] == [1, 1.0]
    assert bins["video"][5] == [1, 2.0]  # the given sample at 0.51 is in no bin
    assert bins["video"][9] == [1, 6.0]  # sigma = 1 belongs to the last bin
    assert bins["video"][3] == [0, None]
    assert [row[0] for row in bins["audio"]] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_loss_of_weight_zero_may_be_anything():
    metrics = Metrics(World())
    metrics.record_losses(losses([1.0, float("nan")], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.3, 0.3]))
    record = closed(metrics).flush()
    assert record["loss_video"] == 1.0
    assert record["loss_audio"] is None
    assert record["loss"] == 1.0


def test_two_ranks_give_the_record_that_one_rank_with_all_samples_gives():
    alone = Metrics(World())
    alone.record_losses(FIRST)
    alone.record_losses(SECOND)
    one = closed(alone).flush()
    second = Pair(rank=1)
    second_metrics = Metrics(second)
    second_metrics.record_losses(SECOND)
    closed(second_metrics).flush()
    first_metrics = Metrics(Pair(rank=0, other=second))
    first_metrics.record_losses(FIRST)
    two = closed(first_metrics).flush()
    for name in ("loss", "loss_video", "loss_audio", "sigma_bins", "step_seconds"):
        assert two[name] == one[name]


def test_the_slowest_rank_gives_the_data_wait():
    slow, fast = Pair(rank=1), None
    metrics = Metrics(slow)
    metrics.record_step(seconds=2.0, data_seconds=1.5)
    metrics.flush()
    fast = Metrics(Pair(rank=0, other=slow))
    fast.record_step(seconds=2.0, data_seconds=0.25)
    assert fast.flush()["data_seconds"] == 1.5


def test_speed_counts_tokens_of_both_streams_and_the_peak_share():
    bucket, text = Bucket(2, 2, 2, 5), TextFeatures(torch.zeros(3, 4), torch.zeros(3, 4))
    batch = collate([placeholder("a", bucket, text), placeholder("b", bucket, text)], [0, 1], bucket, ["b: damaged"])
    metrics = Metrics(World(), peak_flops=100.0)
    metrics.record_batch(replace(batch, retried_reads=3), flops=50.0, recomputed_flops=10.0)
    record = closed(metrics).flush()
    assert (record["samples"], record["tokens"], record["bad_records"]) == (2, 2 * (8 + 5), 1)
    assert record["retried_reads"] == 3
    assert record["tokens_per_second"] == 13.0
    assert record["samples_per_second"] == 1.0
    assert record["mfu"] == 0.25
    assert record["hfu"] == pytest.approx(0.3)


def test_a_rank_that_shares_samples_leaves_counting_to_the_first():
    bucket, text = Bucket(2, 2, 2, 5), TextFeatures(torch.zeros(3, 4), torch.zeros(3, 4))
    metrics = Metrics(World(counts_samples=False))
    metrics.record_losses(FIRST)
    metrics.record_batch(collate([placeholder("a", bucket, text)], [0], bucket), flops=50.0)
    record = closed(metrics).flush()
    assert (record["samples"], record["tokens"], record["loss_video"]) == (0, 0, None)
    assert record["step_seconds"] > 0


def test_a_device_without_a_known_peak_has_no_mfu():
    assert not {"mfu", "hfu"} & closed(Metrics(World())).flush().keys()


def test_a_window_begins_empty():
    metrics = Metrics(World())
    metrics.record_losses(FIRST)
    closed(metrics).flush()
    metrics.record_losses(SECOND)
    assert closed(metrics).flush()["loss_video"] == 6.0


def test_a_rank_that_holds_the_others_up_is_named():
    assert lag([10.0, 10.0, 10.0, 10.5], [0.5, 0.5, 0.5, 0.9]) == []
    straggler, stall = lag([10.0, 10.0, 14.0, 10.0], [0.2, 0.2, 7.0, 0.2], steps=2)
    assert straggler == {"event": "straggler", "rank": 2, "step_seconds": 7.0, "median_seconds": 5.0}
    assert stall == {"event": "data_stall", "rank": 2, "data_seconds": 3.5, "share": 0.5}
    assert [event["event"] for event in lag([10.0], [1.5])] == ["data_stall"]
