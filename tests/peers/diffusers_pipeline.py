"""diffusers' LTX-2 pipeline of tiny parts, from hidden states of a language model to latents. It reads no files.

It agrees with the published arithmetic where both streams share one sigma and nothing is given. It never passes the mark of
the first latent frame that 2.5 has.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ltx2_train.model import TextConditioned
from tests.peers.diffusers_connectors import peer_of as connectors_peer_of
from tests.peers.diffusers_transformer import peer_of

SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
    "time_shift_type": "exponential",
}


class NoCodec(nn.Module):
    """What the pipeline asks of a codec when it stops at latents: its ratios, and statistics that change nothing."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, channels: int, **ratios: int) -> None:
        super().__init__()
        self.latents_mean, self.latents_std = torch.zeros(channels), torch.ones(channels)
        self.config = SimpleNamespace(
            scaling_factor=1.0, sample_rate=16000, mel_hop_length=160, mel_bins=64, latent_channels=8
        )
        for name, ratio in ratios.items():
            setattr(self, f"{name}_compression_ratio", ratio)


def pipeline_of(model: TextConditioned, release: Path) -> Any:
    """The pipeline with our transformer's weights and the connectors of `release`, a file with both."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline

    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=NoCodec(128, spatial=32, temporal=8),
        audio_vae=NoCodec(128, mel=4, temporal=4),
        text_encoder=None,
        tokenizer=None,
        connectors=connectors_peer_of({release}, model.config),
        transformer=peer_of(model.transformer),
        vocoder=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sampled(pipeline: Any, states: Tensor, mask: Tensor, video: Tensor, audio: Tensor, **arguments: Any) -> Any:
    """Latents from the noise `video` (B, 128, F, H, W) and `audio` (B, 8, T, 16).

    `states` (2 B, L, W, N) and `mask` (2 B, L) are of the prompts, then of the negative prompts.
    """
    positive, negative = states.flatten(2).chunk(2)
    positive_mask, negative_mask = mask.chunk(2)
    size = {"num_frames": 8 * (video.shape[2] - 1) + 1, "height": 32 * video.shape[3], "width": 32 * video.shape[4]}
    return pipeline(
        prompt_embeds=positive,
        prompt_attention_mask=positive_mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
        latents=video,
        audio_latents=audio,
        output_type="latent",
        return_dict=False,
        **size,
        **arguments,
    )
