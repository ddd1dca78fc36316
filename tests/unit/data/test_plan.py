from collections import Counter

import numpy as np
import pytest

from ltx2_train.data.plan import MicroBatch, Plan, PlanConfig, SampleRef
from ltx2_train.data.stream import shuffled
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.testing.indexes import CLIP, IMAGE, LONG, SILENT, SOUND, WIDE, make_index

MIXED = {CLIP: 5, WIDE: 3, LONG: 2, SILENT: 0.4, IMAGE: 0.3}


def make_plan(num_samples=3000, buckets=MIXED, weights=None, skipped=frozenset(), **settings):
    config = PlanConfig(**{"micro_batches_per_step": 4, "max_tokens": 512, "block_shards": 4, **settings})
    return Plan([make_index(buckets, num_samples)], weights, config, skipped)


def refs(plan, steps):
    return [ref for n in steps for m in plan.step(n).micro_batches for ref in m.samples]


@pytest.mark.parametrize("settings", [{}, {"micro_batches_per_step": 1}, {"micro_batches_per_step": 32}, {"seed": 3}])
@pytest.mark.parametrize("num_samples", [700, 3000, 3001])
def test_an_epoch_gives_every_sample_once_up_to_what_it_carries_over(num_samples, settings):
    plan = make_plan(num_samples, **settings)
    size = plan.config.micro_batches_per_step
    carried = 16 * len(plan.buckets) + 16 * size * 2  # unfinished micro-batches and unfinished steps, at most
    seen = Counter()
    for epoch in range(4):
        steps = range(plan.steps_before_epoch(epoch), plan.steps_before_epoch(epoch + 1))
        seen.update(refs(plan, steps))
        assert max(seen.values()) <= epoch + 1
        assert (epoch + 1) * num_samples - sum(seen.values()) <= carried
        assert {plan.epoch(n) for n in steps} == {epoch}


def test_epochs_differ_in_order_and_seeds_do_too():
    plan = make_plan()
    per_epoch = plan.steps_before_epoch(1)
    first, second = refs(plan, range(20)), refs(plan, range(per_epoch, per_epoch + 20))
    assert first != second
    assert refs(make_plan(seed=1), range(20)) != first


@pytest.mark.parametrize("num_samples", [1, 3, 40, 3000])
def test_a_step_is_the_same_whenever_it_is_asked_for(num_samples):
    plan = make_plan(num_samples, block_shards=2)
    straight = [plan.step(n) for n in range(120)]
    assert [plan.step(n) for n in reversed(range(120))] == straight[::-1]
    for n in (0, 1, 17, 63, 119):
        assert make_plan(num_samples, block_shards=2).step(n) == straight[n]


def test_steps_after_many_epochs_are_found_at_once():
    plan, n = make_plan(), 1_000_000
    assert make_plan().step(n) == [plan.step(n - 1), plan.step(n)][1]
    assert plan.steps_before_epoch(plan.epoch(n)) <= n < plan.steps_before_epoch(plan.epoch(n) + 1)


def test_the_plan_of_a_seed_never_changes():
    """Not by another version of a library, nor by a change here: a run that goes on must find its order again."""
    micro_batches = make_plan().step(5).micro_batches
    assert {m.bucket for m in micro_batches} == {WIDE}
    numbers = [[ref.number for ref in m.samples] for m in micro_batches]
    assert numbers == [
        [171, 2438, 176, 2582],
        [2164, 2530, 2540, 141],
        [2181, 2579, 2404, 2432],
        [2585, 2115, 135, 2188],
    ]
    assert shuffled(np.arange(8), 0, "golden").tolist() == [7, 2, 6, 3, 0, 5, 1, 4]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_trains_on_the_same_global_steps(world_size):
    plan = make_plan(split=1)
    for n in range(30):
        parts = [plan.rank_step(n, rank, world_size) for rank in range(world_size)]
        woven = tuple(parts[i % world_size][i // world_size] for i in range(4))
        assert woven == plan.step(n).micro_batches


@pytest.mark.parametrize(("world_size", "split"), [(8, None), (8, 2), (2, 2), (3, 3), (12, None), (3, None)])
def test_a_split_keeps_samples_and_positions(world_size, split):
    plan = make_plan(split=split, buckets={CLIP: 2, WIDE: 1}, max_tokens=1024)
    for n in range(10):
        ranks = [plan.rank_step(n, rank, world_size) for rank in range(world_size)]
        assert len({len(parts) for parts in ranks}) == 1
        loaded = {p: ref for parts in ranks for m in parts for p, ref in zip(m.positions, m.samples, strict=True)}
        whole = [ref for m in plan.step(n).micro_batches for ref in m.samples]
        assert loaded == dict(enumerate(whole))


def test_a_micro_batch_is_cut_into_contiguous_parts_of_nearly_equal_length():
    whole = MicroBatch(CLIP, tuple(SampleRef(0, i) for i in range(7)), tuple(range(10, 17)))
    parts = whole.split(3)
    assert [len(p.samples) for p in parts] == [2, 2, 3]
    assert sum((p.positions for p in parts), ()) == whole.positions


@pytest.mark.parametrize(("split", "valid"), [(1, "1, 2, 4"), (2, "1, 2, 4, 8"), (None, "1, 2, 3, 4, 6, 8, 12")])
def test_a_world_that_does_not_fit_names_those_that_do(split, valid):
    plan = make_plan(split=split)  # the smallest micro-batch has 3 samples
    with pytest.raises(ConfigError, match=f"^5 data ranks .*engine.sequence.*valid numbers are {valid} "):
        plan.rank_step(0, 0, 5)
    assert plan.valid_data_sizes() == [int(n) for n in valid.split(", ")]


def test_positions_run_through_the_global_batch():
    plan = make_plan()
    for n in range(50):
        step = plan.step(n)
        assert [p for m in step.micro_batches for p in m.positions] == list(range(step.num_samples))


def test_a_micro_batch_holds_one_bucket_within_its_budget():
    plan, index = make_plan(max_samples=6), make_index(MIXED, 3000)
    for n in range(200):
        for m in plan.step(n).micro_batches:
            assert {index.bucket(ref.number) for ref in m.samples} == {m.bucket}
            assert m.tokens <= 512
            assert len(m.samples) == min(6, 512 // m.bucket.tokens)


def test_the_micro_batches_of_a_step_have_the_same_modalities_and_about_the_same_cost():
    plan = make_plan(20000, max_samples=1)  # the cost is that of the bucket: it varies by 6
    steps = [plan.step(n) for n in range(plan.steps_before_epoch(1))]
    signatures = [{m.bucket.signature for m in step.micro_batches} for step in steps]
    spreads = [max(m.tokens for m in s.micro_batches) / min(m.tokens for m in s.micro_batches) for s in steps]
    assert all(len(s) == 1 for s in signatures)
    assert np.mean(np.array(spreads) == 1.0) > 0.95


def test_a_signature_too_rare_to_fill_a_step_shares_one_instead_of_waiting():
    plan = make_plan(2000, buckets={CLIP: 1000, SILENT: 1}, max_samples=1, micro_batches_per_step=16)
    epoch = refs(plan, range(plan.steps_before_epoch(1)))
    index = make_index({CLIP: 1000, SILENT: 1}, 2000)
    silent = {i for i in range(2000) if index.bucket(i) == SILENT}
    assert 0 < len(silent) < 16
    assert silent <= {ref.number for ref in [*epoch, *refs(plan, range(len(epoch) // 16, len(epoch) // 16 + 1))]}


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_a_dataset_smaller_than_a_step_is_repeated_at_other_positions(num_samples):
    plan = make_plan(num_samples, buckets={CLIP: 1}, max_samples=4)
    for n in range(5):
        step = plan.step(n)
        assert step.num_samples == 16
        assert Counter(ref.number for m in step.micro_batches for ref in m.samples).total() == 16
        assert [p for m in step.micro_batches for p in m.positions] == list(range(16))
    counts = Counter(ref.number for ref in refs(plan, range(5 * num_samples)))
    assert set(counts.values()) == {80}


def test_samples_stay_close_to_their_shards():
    """A stretch of steps touches few shards, so that caches and page tables stay small at any size of the dataset."""
    plan = make_plan(20000, block_shards=4)
    shards = {ref.number // 100 for ref in refs(plan, range(20))}
    assert len(shards) <= 8


def test_skipped_samples_never_come_and_all_others_do():
    index = make_index(MIXED, 700)
    lost = frozenset(index.key(i) for i in range(0, 700, 50))
    plan, again = make_plan(700, skipped=lost), make_plan(700, skipped=lost)
    steps = range(plan.steps_before_epoch(3))
    seen = {ref.number for ref in refs(plan, steps)}
    assert seen == set(range(700)) - set(range(0, 700, 50))
    assert [again.step(n) for n in reversed(steps)] == [plan.step(n) for n in reversed(steps)]


def test_a_skipped_sample_that_is_not_there_is_an_error():
    with pytest.raises(DataError, match="skipped sample who is in none of the datasets"):
        make_plan(skipped=frozenset({"who"}))


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [3, 3, 1]])
def test_a_mixture_converges_to_its_weights(weights):
    indexes = [make_index(MIXED, n, name=name) for n, name in ((2000, "a"), (333, "b"), (5000, "c"))]
    plan = Plan(indexes, weights, PlanConfig(micro_batches_per_step=4, max_tokens=512, block_shards=2))
    counts = Counter(ref.dataset for ref in refs(plan, range(500)))
    fractions = np.array([counts[d] for d in range(3)]) / counts.total()
    np.testing.assert_allclose(fractions, np.array(weights) / sum(weights), atol=0.01)
    assert Plan(indexes, weights, plan.config).step(321) == plan.step(321)
    small = Counter(ref.number for ref in refs(plan, range(500)) if ref.dataset == 1)
    assert max(small.values()) - min(small.get(i, 0) for i in range(333)) <= 2


def test_a_mixture_without_weights_gives_every_sample_once_per_epoch():
    indexes = [make_index({CLIP: 1, WIDE: 1}, 2000, name="a"), make_index({CLIP: 1}, 400, name="b")]
    plan = Plan(indexes, None, PlanConfig(micro_batches_per_step=2, max_tokens=512))
    seen = Counter(refs(plan, range(plan.steps_before_epoch(1))))
    assert max(seen.values()) == 1
    assert 2400 - seen.total() <= 16 * 3 + 32
    assert any(
        len({ref.dataset for ref in m.samples}) == 2 for m in plan.step(0).micro_batches + plan.step(1).micro_batches
    )


def test_counts_are_the_samples_that_have_each_modality():
    plan = make_plan(buckets={CLIP: 1, SILENT: 1, SOUND: 1}, micro_batches_per_step=2)
    for n in range(60):
        buckets = [m.bucket for m in plan.step(n).micro_batches for _ in m.samples]
        assert plan.counts(n) == (sum(b.frames > 0 for b in buckets), sum(b.audio_steps > 0 for b in buckets))


def test_a_hundred_thousand_samples_are_planned_in_full():
    index = make_index(MIXED, 100_000, shard_samples=1000)
    plan = Plan([index], None, PlanConfig(micro_batches_per_step=8, max_tokens=512))
    numbers = [ref.number for ref in refs(plan, range(plan.steps_before_epoch(1)))]
    assert len(numbers) == len(set(numbers)) > 99_000


def test_a_bucket_above_the_token_budget_is_refused():
    with pytest.raises(
        ConfigError, match=r"max_tokens = 100, but one sample of bucket 7x4x4\+56 has 168 tokens; .* >= 168"
    ):
        make_plan(max_tokens=100, buckets={LONG: 1})


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="dataset 0 of the mixture has no samples"):
        make_plan(num_samples=1, skipped=frozenset({"a0000000"}))


@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.0], [-1.0]])
def test_weights_must_be_positive_and_one_per_dataset(weights):
    with pytest.raises(ConfigError, match="weights"):
        make_plan(weights=weights)


@pytest.mark.parametrize("name", ["micro_batches_per_step", "max_tokens", "max_samples", "block_shards", "split"])
def test_settings_out_of_bounds_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        PlanConfig(**{name: 0})
