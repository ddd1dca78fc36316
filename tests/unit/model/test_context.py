"""Contexts that groups of a batch and many forwards share: the same numbers, made once.

In fp64, where rounding hides nothing.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ltx2_train.model import ModelConfig, TextConditioned, build_model, initial_weights
from ltx2_train.model.modality import SharedContext
from tests.golden.transformer_cases import inputs, tiny_model
from tests.peers.diffusers_transformer import random_inputs

VARIANTS = ["2.0", "2.3", "2.5", "2.5kv"]
KEEPS_KEYS = {"2.0", "2.5kv"}  # no sigma in their text: keys and values stay
GROUPS = (0, 1, 0, 0)  # contexts of the groups: those of guidance


def repeated(modality, contexts, masks):
    """The modality once for each group, with the groups' contexts as one tensor."""
    tensors = ("latent", "sigma", "timesteps", "keyframes_mask", "positions")
    parts = {n: getattr(modality, n) for n in tensors if getattr(modality, n) is not None}
    size = len(modality.latent)
    rows = {n: t.repeat(len(GROUPS), *[1] * (t.ndim - 1)) for n, t in parts.items() if len(t) == size}
    whole = replace(modality, **(rows | {"latent": rows["latent"].double()}))
    mask = None if masks is None else torch.cat([masks[i] for i in GROUPS])
    return replace(whole, context=torch.cat([contexts[i] for i in GROUPS]), context_mask=mask, attention_mask=None)


def both_forms(modality, rows: int):
    """(with one tensor, with shared contexts): two texts for four groups; with a mask where the modality has one."""
    torch.manual_seed(rows)
    width, size = modality.context.shape[-1], len(modality.latent)
    texts = [torch.randn(size, rows, width).double() for _ in range(2)]
    masks = None
    if modality.context_mask is not None:
        masks = [torch.ones(size, rows, dtype=torch.long), torch.ones(size, rows, dtype=torch.long)]
        masks[1][:, -1] = 0
    shared = [SharedContext(text, None if masks is None else masks[i]) for i, text in enumerate(texts)]
    plain = repeated(modality, texts, masks)
    return plain, replace(plain, context=tuple(shared[i] for i in GROUPS), context_mask=None)


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12 * max(1.0, b.abs().max().item()), rtol=0)


def count_rows(module, name, seen):
    """Adds up the samples that a layer is called with."""
    return module.get_submodule(name).register_forward_hook(lambda _, args, __: seen.update({name: len(args[0])}))


@pytest.mark.parametrize("case", ["joint", "joint-masks-stg"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_shared_contexts_give_the_numbers_of_one_tensor_at_every_sigma(variant, case):
    model = tiny_model(variant).double()
    given = inputs(variant, case)
    (plain_video, video), (plain_audio, audio) = (both_forms(modality, 4) for modality in given[:2])
    for factor in (1.0, 0.5):
        of_group = torch.tensor([factor, 0.7, factor, factor]).repeat_interleave(2)
        at = [
            replace(m, sigma=m.sigma * of_group, timesteps=m.timesteps * of_group[:, None])
            for m in (plain_video, plain_audio, video, audio)
        ]
        assert_close(model(at[2], at[3]), model(at[0], at[1]))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_what_depends_on_the_text_alone_is_made_once(variant):
    """Keys of two contexts of two samples: once in all, or once a forward where sigma modulates the text."""
    model = tiny_model(variant).double()
    video, audio = (both_forms(modality, 4)[1] for modality in inputs(variant, "joint")[:2])
    rows: Counter[str] = Counter()
    for name in ("transformer_blocks.1.attn2.to_k", "transformer_blocks.1.audio_attn2.to_v"):
        count_rows(model, name, rows)
    if variant == "2.0":
        count_rows(model, "caption_projection", rows)
    for _ in range(3):
        model(video, audio)
    assert set(rows.values()) == {4 if variant in KEEPS_KEYS else 12}


@torch.no_grad()
def test_a_text_of_another_length_is_another_context():
    model = tiny_model("2.0").double()
    streams = inputs("2.0", "joint")[:2]
    for rows in (4, 7):
        (plain_video, video), (plain_audio, audio) = (both_forms(modality, rows) for modality in streams)
        assert_close(model(video, audio), model(plain_video, plain_audio))


@pytest.mark.parametrize("variant", ["2.0", "2.3"])
def test_gradients_are_those_of_one_tensor_and_nothing_is_kept(variant):
    model = tiny_model(variant).double()
    (plain_video, video), (plain_audio, audio) = (both_forms(m, 4) for m in inputs(variant, "joint")[:2])
    gradients = []
    for given in ((plain_video, plain_audio), (video, audio), (video, audio)):
        model.zero_grad()
        sum(velocity.square().mean() for velocity in model(*given)).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        for found in gradients[1:]:
            torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=1e-9)


@pytest.fixture(scope="module")
def conditioned():
    config = ModelConfig(name="tiny", train_connectors=False)
    model = build_model(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in initial_weights(model, config, 0):
            model.get_parameter(name).copy_(tensor + 0.05 * torch.randn_like(tensor))
    return model.double()


@torch.no_grad()
def test_connectors_run_once_for_a_context(conditioned):
    rows: Counter[str] = Counter()
    hook = count_rows(conditioned, "connectors.video_embeddings_connector.transformer_1d_blocks.0.ff", rows)
    given = random_inputs(conditioned.config, 2, (3, 2, 2), 5, 4)
    (plain_video, video), (plain_audio, audio) = (both_forms(modality, 4) for modality in given)
    found = [conditioned(video, audio) for _ in range(3)]
    assert rows.total() == 4
    hook.remove()
    for velocities in found:
        assert_close(velocities, conditioned(plain_video, plain_audio))


@torch.no_grad()
def test_stored_contexts_can_be_shared(conditioned):
    bare = TextConditioned(conditioned.transformer, None, conditioned.text_tokens)
    given = random_inputs(conditioned.config, 2, (3, 2, 2), 5, conditioned.text_tokens)
    (plain_video, video), (plain_audio, audio) = (both_forms(modality, bare.text_tokens) for modality in given)
    assert_close(bare(video, audio), bare(plain_video, plain_audio))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("SKIP_VIDEO_SELF_ATTN", "attn1.to_q"),
        ("SKIP_AUDIO_SELF_ATTN", "audio_attn1.to_k"),
        ("SKIP_A2V", "audio_to_video_attn.to_q"),
        ("SKIP_V2A", "video_to_audio_attn.to_v"),
    ],
)
@torch.no_grad()
def test_samples_that_skip_an_operation_are_not_computed(kind, layer):
    """Alone, the perturbed sample of a mixed batch gives the same; samples apart from each other fall back on masks."""
    model = tiny_model("2.3").double()
    video, audio = (both_forms(modality, 4)[0] for modality in inputs("2.3", "joint")[:2])
    assert len(video.latent) == 8
    skips = [(kind, [1])]
    masked = model(video, audio, [skips if i in (0, 5) else [] for i in range(8)])
    rows: Counter[str] = Counter()
    name = f"transformer_blocks.1.{layer}"
    hook = count_rows(model, name, rows)
    for first, last in ((0, 3), (5, 8)):
        perturbed = model(video, audio, [skips if first <= i < last else [] for i in range(8)])
        place = 0 if first == 0 else 5
        assert_close([v[place] for v in perturbed], [v[place] for v in masked])
    assert rows[name] == 5 + 5
    model(video, audio, [skips] * 8)
    assert rows[name] == 5 + 5
    model(video, audio, [skips if i in (0, 5) else [] for i in range(8)])
    hook.remove()
    assert rows[name] == 5 + 5 + 8
