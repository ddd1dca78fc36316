"""The engine's settings and their bounds."""

import pytest

from ltx2_train.distributed.engine import AdamWConfig, Backend, EngineConfig, Offload, Precision, Recompute
from ltx2_train.errors import ConfigError


def test_names_become_enums():
    config = EngineConfig(precision="bf16", recompute="every_n", backend="zero3", offload="all")
    assert (config.precision, config.recompute) == (Precision.bf16, Recompute.every_n)
    assert (config.backend, config.offload) == (Backend.zero3, Offload.all)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EngineConfig(grad_clip=0), r"engine\.grad_clip=0: must be above 0"),
        (lambda: EngineConfig(skip_above=float("nan")), r"engine\.skip_above=nan"),
        (lambda: EngineConfig(recompute_every=0), r"engine\.recompute_every=0: must be 1 or more"),
        (lambda: EngineConfig(replicate=0), r"engine\.replicate=0: must be 1 or more"),
        (lambda: EngineConfig(prefetch=-1), r"engine\.prefetch=-1: must be 0 or more"),
        (lambda: EngineConfig(recompute_budget_gb=0.0), r"engine\.recompute_budget_gb=0\.0: must be above 0"),
        (
            lambda: EngineConfig(recompute="selective", compile=True),
            r"engine\.compile=true: .* Take engine\.recompute=full",
        ),
        (lambda: EngineConfig(recompute="budget"), r"engine\.recompute=budget: say how many GB"),
        (
            lambda: EngineConfig(recompute="budget", recompute_budget_gb=1.0, sequence=2),
            r"engine\.recompute=budget with engine\.sequence=2: .* would choose each for itself",
        ),
        (
            lambda: EngineConfig(backend="zero3", replicate=2),
            r"engine\.replicate=2: engine\.backend=zero3 shards over all",
        ),
        (lambda: EngineConfig(backend="zero3", reshard=False), r"engine\.reshard=False: engine\.backend=zero3"),
        (
            lambda: EngineConfig(backend="zero3", compile=True),
            r"engine\.compile=True: engine\.backend=zero3 gathers weights inside a block",
        ),
        (
            lambda: EngineConfig(backend="zero3", recompute="selective"),
            r"engine\.recompute=selective: engine\.backend=zero3 gathers .* Take engine\.recompute=full",
        ),
        (
            lambda: EngineConfig(backend="zero3", recompute="budget", recompute_budget_gb=1.0),
            r"engine\.recompute=budget: engine\.backend=zero3 gathers .* Take engine\.recompute=full or every_n, or",
        ),
        (lambda: EngineConfig(backend="zero3", prefetch=1), r"engine\.prefetch=1: .* Leave it at 0"),
        (lambda: EngineConfig(freeze=["a("]), r"engine\.freeze: 'a\(' is not a regular expression"),
        (lambda: AdamWConfig(betas=[0.9]), r"engine\.optimizer\.betas=\[0\.9\]: two numbers"),
        (lambda: AdamWConfig(eps=0), r"engine\.optimizer\.eps=0"),
        (lambda: AdamWConfig(weight_decay=-1), r"engine\.optimizer\.weight_decay=-1"),
    ],
)
def test_what_is_out_of_bounds_is_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_only_matrices_decay_and_no_table():
    decays = AdamWConfig().decays
    assert decays("transformer.transformer_blocks.0.attn1.to_q.weight", 2)
    assert not decays("transformer.transformer_blocks.0.attn1.to_q.bias", 1)
    assert not decays("transformer.transformer_blocks.0.attn1.q_norm.weight", 1)
    for table in (
        "transformer.scale_shift_table",
        "transformer.transformer_blocks.3.audio_prompt_scale_shift_table",
        "transformer.transformer_blocks.3.scale_shift_table_a2v_ca_video",
        "transformer.keyframes_abs_pos_embedding",
        "connectors.video_embeddings_connector.learnable_registers",
    ):
        assert not decays(table, 2)
