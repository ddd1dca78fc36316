"""Where released codecs lie: nothing of them stays behind when they leave a device."""

import torch

from ltx2_train.codecs import load_audio_codec, load_video_codec
from ltx2_train.testing.released import write_release


def devices(codec, *modules: torch.nn.Module) -> set[str]:
    held = [codec.mean, codec.deviation, *(p for m in modules for p in (*m.parameters(), *m.buffers()))]
    return {codec.device.type, *(tensor.device.type for tensor in held)}


def test_released_codecs_move_as_a_whole(tmp_path):
    release = write_release(tmp_path, "2.3")
    video, audio = load_video_codec(release.video_vae), load_audio_codec(release.audio_vae, release.vocoder)
    parts = {video: (video.encoder, video.decoder), audio: (audio.encoder, audio.decoder, audio.vocoder)}
    for codec, modules in parts.items():
        assert devices(codec, *modules) == {"cpu"}
        codec.to("meta")
        assert devices(codec, *modules) == {"meta"}
