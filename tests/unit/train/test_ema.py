"""The moving average, in numbers."""

import pytest
import torch

from ltx2_train.errors import ConfigError
from ltx2_train.train.ema import Ema, EmaConfig


def test_the_average_of_a_jump_closes_the_gap_by_the_decay_each_time():
    weight = torch.zeros(3)
    ema = Ema([("w", weight)], EmaConfig(decay=0.75, ramp=False))
    weight += 1
    for update in range(1, 5):
        ema.update([("w", weight)])
        torch.testing.assert_close(ema.weights()["w"], torch.full((3,), 1 - 0.75**update))


def test_the_ramp_forgets_the_initial_weights_soon():
    ema = Ema([("w", torch.zeros(1))], EmaConfig(decay=0.99))
    decays = []
    for _ in range(2000):
        decays.append(ema.decay())
        ema.update([("w", torch.ones(1))])
    assert decays[0] == pytest.approx(0.1)
    assert decays[10] == pytest.approx(11 / 20)
    assert decays[-1] == 0.99
    assert decays == sorted(decays)


def test_the_average_is_fp32_and_apart_from_the_weights():
    weight = torch.ones(2, dtype=torch.bfloat16)
    ema = Ema([("w", weight)], EmaConfig())
    weight.zero_()
    assert ema.weights()["w"].dtype == torch.float32
    assert ema.weights()["w"].tolist() == [1, 1]


def test_sharded_averages_are_the_shards_of_the_average():
    whole = torch.randn(7, 5)
    parts = [part.clone() for part in whole.tensor_split(3)]
    averages = [Ema([("w", part)], EmaConfig()) for part in parts]
    average = Ema([("w", whole.clone())], EmaConfig())
    for _ in range(4):
        whole = whole + torch.randn(7, 5)
        average.update([("w", whole)])
        for part, ema in zip(whole.tensor_split(3), averages, strict=True):
            ema.update([("w", part)])
    assert torch.equal(torch.cat([ema.weights()["w"] for ema in averages]), average.weights()["w"])


def test_it_goes_on_where_it_was():
    straight = Ema([("w", torch.zeros(4))], EmaConfig())
    resumed = Ema([("w", torch.zeros(4))], EmaConfig())
    steps = torch.randn(6, 4)
    for step in steps[:3]:
        straight.update([("w", step)])
    saved = straight.state()
    resumed.state()["ema"]["w"].copy_(saved["ema"]["w"])  # what Engine.load does
    resumed.restore({"ema_updates": saved["ema_updates"]})
    for step in steps[3:]:
        straight.update([("w", step)])
        resumed.update([("w", step)])
    assert torch.equal(straight.weights()["w"], resumed.weights()["w"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_out_of_bounds_is_an_error(decay):
    with pytest.raises(ConfigError, match=f"ema.decay={decay}: must lie in"):
        EmaConfig(decay=decay)
