"""The demo model, the objective and the optimizer together can learn one batch by heart."""

import pytest
import torch

from ltx2_train.batch import collate
from ltx2_train.codecs import build_audio_codec, build_video_codec
from ltx2_train.data.synthetic import bounce_clip
from ltx2_train.diffusion.objective import Objective, ObjectiveConfig
from ltx2_train.distributed.build import build_engine
from ltx2_train.distributed.engine import EngineConfig, Precision
from ltx2_train.distributed.world import close_world, init_world
from ltx2_train.model import ModelConfig, build_model, initial_weights, named_config
from ltx2_train.record import Sample
from ltx2_train.rng import BatchRng
from ltx2_train.text import build_text_encoder

CLIPS, STEPS, LEARNING_RATE = 8, 250, 2e-3
MODEL = ModelConfig(name="demo")


def bounce_batch():
    """Clips of the bounce world as the embedded codec sees them."""
    clips = [bounce_clip(seed) for seed in range(CLIPS)]
    frames = torch.stack([torch.from_numpy(c.video) for c in clips]).movedim(-1, 1).float() / 127.5 - 1
    waveforms = torch.stack([torch.as_tensor(c.waveform) for c in clips])
    config = named_config("demo")
    text = build_text_encoder("hashed", config.video_connector_width, config.audio_connector_width)
    latents = build_video_codec("dct").encode(frames), build_audio_codec("dct").encode(waveforms, 16000)
    rows = zip(clips, *latents, text.encode([c.caption for c in clips]), strict=True)
    samples = [Sample(str(i), v, a, t, c.fps, c.caption) for i, (c, v, a, t) in enumerate(rows)]
    return collate(samples, range(CLIPS), samples[0].bucket)


@pytest.mark.slow
def test_the_loss_on_one_batch_falls_tenfold_for_both_streams():
    batch, rng = bounce_batch(), BatchRng(0, 0, range(CLIPS))
    objective = Objective(ObjectiveConfig(), None, keyframe_marker=True)
    try:
        config = EngineConfig(precision=Precision.fp32)
        engine = build_engine(lambda: build_model(MODEL), lambda m: initial_weights(m, MODEL, 0), config, init_world())
        history = []
        for _ in range(STEPS):
            losses = objective(engine.model, batch, rng)
            engine.backward(losses.total(losses.counts()), last=True)
            engine.step(lr=LEARNING_RATE)
            history.append((losses.video.mean().item(), losses.audio.mean().item()))
    finally:
        close_world()
    (video, audio), (last_video, last_audio) = history[0], history[-1]
    print(f"video {video:.3f} -> {last_video:.4f}, audio {audio:.3f} -> {last_audio:.4f} in {STEPS} steps")
    assert last_video < video / 10
    assert last_audio < audio / 10
