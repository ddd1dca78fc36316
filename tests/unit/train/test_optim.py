import math
from itertools import pairwise

import pytest

from ltx2_train.errors import ConfigError
from ltx2_train.train.optim import OptimConfig, Schedule, learning_rate


def test_the_rate_rises_linearly_and_reaches_its_peak_with_the_last_warm_up_step():
    config = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, config) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(0, OptimConfig(lr=3e-4, warmup_steps=0)) == 3e-4


def test_a_linear_tail_is_constant_to_its_start_and_ends_at_the_floor():
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule=Schedule.linear, total_steps=100, decay_start=0.6, floor=0.02)
    rates = [learning_rate(step, config) for step in (0, 60, 80, 100, 500)]
    assert rates == pytest.approx([1.0, 1.0, 0.51, 0.02, 0.02])


def test_a_cosine_tail_is_half_way_down_in_its_middle_and_never_rises():
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule=Schedule.cosine, total_steps=50)
    rates = [learning_rate(step, config) for step in range(60)]
    assert rates[25] == pytest.approx(0.5)
    assert rates[10] == pytest.approx((1 + math.cos(math.pi / 5)) / 2)
    assert all(a >= b for a, b in pairwise(rates))
    assert rates[50] == pytest.approx(0.0)


def test_the_rate_of_a_step_does_not_depend_on_which_steps_were_asked_before():
    config = OptimConfig(schedule=Schedule.cosine, total_steps=30, warmup_steps=5)
    forward = [learning_rate(step, config) for step in range(30)]
    assert [learning_rate(step, config) for step in reversed(range(30))] == forward[::-1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", -1e-4),
        ("warmup_steps", -1),
        ("total_steps", 0),
        ("decay_start", 1.0),
        ("floor", 1.5),
    ],
)
def test_a_setting_out_of_its_bound_is_named(field, value):
    with pytest.raises(ConfigError, match=rf"optim\.{field}="):
        OptimConfig(**{field: value})
