"""Small latent datasets for tests, in the format that `data_prep.encode` writes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ltx2_train.data.datasets import save_null_text
from ltx2_train.data.index import build_index
from ltx2_train.data.shards import file_hash, write_shard
from ltx2_train.geometry import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS
from ltx2_train.record import Bucket, Manifest, Sample, TextFeatures
from ltx2_train.rng import generator

TEXT_WIDTHS = (32, 16)  # video, audio


def random_sample(
    key: str, bucket: Bucket, *, text_length: int = 4, text_widths: tuple[int, int] = TEXT_WIDTHS, fps: float = 25.0
) -> Sample:
    """A sample of standard normal latents and text features that depends on its key alone."""
    g = generator("random_sample", key)
    video_shape = (VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width)
    audio_shape = (AUDIO_CHANNELS, bucket.audio_steps, AUDIO_BINS)
    return Sample(
        key=key,
        video=torch.randn(video_shape, generator=g) if bucket.frames else None,
        audio=torch.randn(audio_shape, generator=g) if bucket.audio_steps else None,
        text=TextFeatures(*(torch.randn(text_length, width, generator=g) for width in text_widths)),
        fps=fps,
        caption=f"caption of {key}",
    )


def manifest_for(sample: Sample) -> Manifest:
    """A manifest of the embedded codecs and text features, with the widths of the sample's text."""
    widths = sample.text.video.shape[1], sample.text.audio.shape[1]
    return Manifest(
        video_codec="dct-1",
        audio_codec="dct-1",
        text_encoder=f"hashed-1/{widths[0]}+{widths[1]}",
        video_text_width=widths[0],
        audio_text_width=widths[1],
        code_version="test",
    )


def write_latent_dataset(
    directory: str | Path,
    samples: Sequence[Sample],
    *,
    manifest: Manifest | None = None,
    null_text: TextFeatures | None = None,
    shard_samples: int = 8,
) -> Manifest:
    """Write shards of `shard_samples` samples, the null context, the index and the manifest; returns the manifest.

    `manifest` gives the provenance; its shard hashes and counts are filled in. Without one, and without a null
    context, stand-ins that match the first sample are written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards = {}
    for start in range(0, len(samples), shard_samples):
        path = directory / f"shard-{start // shard_samples:06d}.tar"
        write_shard(path, samples[start : start + shard_samples])
        shards[path.name] = file_hash(path)
    manifest = replace(manifest or manifest_for(samples[0]), shards=shards, counts={"kept": len(samples)})
    widths = manifest.video_text_width, manifest.audio_text_width
    save_null_text(directory, null_text or TextFeatures(*(torch.zeros(1, width) for width in widths)))
    build_index(directory)
    manifest.save(directory)
    return manifest
