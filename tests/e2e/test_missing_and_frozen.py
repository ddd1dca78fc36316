"""What a sample lacks teaches nothing, what is frozen does not move, and what does not fit is refused before it runs."""

import pytest
import torch

from ltx2_train.batch import collate
from ltx2_train.cli.train import train
from ltx2_train.diffusion.conditioning import ConditioningConfig, ConditioningKind
from ltx2_train.diffusion.objective import Objective, ObjectiveConfig
from ltx2_train.distributed.saved import saved_weights
from ltx2_train.distributed.world import close_world, init_world
from ltx2_train.model import ModelConfig, build_model, initial_weights
from ltx2_train.record import Bucket
from ltx2_train.rng import BatchRng
from ltx2_train.testing.shards import random_sample, write_latent_dataset
from ltx2_train.train.checkpoint import checkpoint_directory
from tests.unit.cli.commands import SMALL, composed, ltx2_train, small_dataset

AUDIO_SIDE = ("audio", "a2v", "v2a")


def trained_looking_model() -> torch.nn.Module:
    """No weight is zero, so that a gradient that should not be there would show."""
    config = ModelConfig(name="tiny")
    model = build_model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in initial_weights(model, config, seed=0):
            model.get_parameter(name).copy_(tensor + 0.05 * torch.randn(tensor.shape))
    return model


@pytest.mark.parametrize(
    ("bucket", "silent"), [(Bucket(3, 2, 2, 0), "audio"), (Bucket(1, 2, 2, 0), "audio"), (Bucket(0, 0, 0, 13), "video")]
)
def test_a_batch_without_a_stream_leaves_that_stream_s_gradients_exactly_zero(bucket: Bucket, silent: str):
    samples = [random_sample(f"s{i}", bucket, text_length=3, text_widths=(40, 20)) for i in range(3)]
    batch, rng = collate(samples, range(3), bucket), BatchRng(0, 0, range(3))
    model = trained_looking_model()
    losses = Objective(ObjectiveConfig(), None, keyframe_marker=True)(model, batch, rng)
    losses.total(losses.counts()).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    named = dict(model.named_parameters())
    audio_side = {n for n in named if any(word in n for word in AUDIO_SIDE)}
    exchange = {
        n for n in named if "a2v" in n or "v2a" in n or "audio_to_video" in n or "video_to_audio" in n or "av_ca" in n
    }
    lacking = audio_side if silent == "audio" else (named.keys() - audio_side) | exchange
    assert moved & lacking == set()
    assert all(named[n].grad is not None for n in lacking), "every module ran, so that ranks agree on what is reduced"
    assert moved == named.keys() - lacking - exchange


@pytest.mark.parametrize("bucket", [Bucket(3, 2, 2, 9), Bucket(3, 2, 2, 0), Bucket(1, 2, 2, 0), Bucket(0, 0, 0, 13)])
@pytest.mark.parametrize("given", [None, *ConditioningKind])
def test_every_parameter_is_reached_whatever_a_batch_has_and_is_given(bucket: Bucket, given: ConditioningKind | None):
    """What an engine asks of a model: which gradients are reduced must not depend on a rank's samples."""
    conditioning = [] if given is None else [ConditioningConfig(kind=given)]
    samples = [random_sample(f"s{i}", bucket, text_length=3, text_widths=(40, 20)) for i in range(2)]
    batch, rng = collate(samples, range(2), bucket), BatchRng(0, 0, range(2))
    model = trained_looking_model()
    losses = Objective(ObjectiveConfig(conditioning=conditioning), None, keyframe_marker=True)(model, batch, rng)
    losses.total(torch.ones(2)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_frozen_stream_is_bit_equal_after_five_steps_under_weight_decay(tmp_path):
    latents = small_dataset(tmp_path / "latents")
    arguments = (
        *SMALL,
        f"data.datasets.0.path={latents}",
        f"train.run_dir={tmp_path / 'run'}",
        "train.max_steps=5",
        "train.save_every=1",
        "optim.warmup_steps=0",
        "engine.optimizer.weight_decay=0.5",
        r"engine.freeze=['.*audio.*', '.*v2a_gate.*']",
    )
    try:
        train(composed(*arguments), init_world())
    finally:
        close_world()
    first, last = (dict(saved_weights(checkpoint_directory(tmp_path / "run", step))) for step in (1, 5))
    for name in first:
        frozen = "audio" in name or "v2a_gate" in name
        assert torch.equal(first[name], last[name]) == frozen, name


def test_captions_longer_than_the_model_s_context_are_named_before_anything_is_built(tmp_path, capsys):
    lengths = [3] * 7 + [20]
    samples = [
        random_sample(f"s{i}", Bucket(2, 1, 1, 5), text_length=n, text_widths=(40, 20)) for i, n in enumerate(lengths)
    ]
    (tmp_path / "latents").mkdir()
    write_latent_dataset(tmp_path / "latents", samples)
    run = tmp_path / "run"
    assert ltx2_train(*SMALL, f"data.datasets.0.path={tmp_path / 'latents'}", f"train.run_dir={run}") == 2
    error = capsys.readouterr().err
    assert "1 captions have more than the 16 text tokens" in error
    assert "of s7, has 20" in error
    assert not (run / "metrics.jsonl").exists()
