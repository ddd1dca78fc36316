"""Measure the embedded codecs on the bounce world: `python -m data_prep.measure_codec` prints round-trip figures.

`--write-statistics` measures the channel statistics instead and writes the file that the package ships. Do that only
with a new `VERSION` in `ltx2_train/codecs/dct.py`: latents of other statistics are another dataset.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ltx2_train.codecs import dct
from ltx2_train.data.synthetic import SAMPLE_RATE, Clip, WorldConfig, bounce_clip
from ltx2_train.evals import sync

STATISTICS_SEED = 1_000_000_000  # far from the seeds of any dataset
FIGURES_SEED = 2_000_000_000


def clip_tensors(clip: Clip) -> tuple[Tensor, Tensor | None]:
    """Video (3, F, H, W) in [-1, 1] and waveform (2, N) of a clip."""
    video = torch.from_numpy(clip.video).permute(3, 0, 1, 2).float() / 127.5 - 1
    return video, None if clip.waveform is None else torch.from_numpy(clip.waveform)


def world_sample(seed: int, num_clips: int, config: WorldConfig) -> Iterator[Clip]:
    """Clips `seed`, `seed + 1`, ..."""
    return (bounce_clip(seed + i, config) for i in range(num_clips))


def write_statistics(num_clips: int) -> Path:
    """Measure the statistics on the default world and write them into the package."""
    clips = world_sample(STATISTICS_SEED, num_clips, WorldConfig())
    measured = dct.measure_statistics(clip_tensors(clip) for clip in clips)
    source = f"{num_clips} clips of the default bounce world, seeds from {STATISTICS_SEED}"
    path = Path(dct.__file__).with_name(dct.STATISTICS_FILE)
    path.write_text(json.dumps({"source": source} | measured) + "\n")
    return path


@torch.no_grad()
def measure(num_clips: int, size: int) -> dict[str, float]:
    """Round-trip figures of both codecs on `num_clips` clips of `size` px that no statistics were taken from."""
    video_codec, audio_codec, figures = dct.DctVideoCodec(), dct.DctAudioCodec(), {}
    clips = list(world_sample(FIGURES_SEED, num_clips, WorldConfig(width=size, height=size)))
    video, waveform = (torch.stack(list(side)) for side in zip(*map(_pair, clips), strict=True))
    encoded, figures["video encode, ms per clip"] = _timed(video_codec.encode, video)
    decoded, figures["video decode, ms per clip"] = _timed(video_codec.decode, encoded)
    latents, figures["audio encode, ms per clip"] = _timed(lambda clip: audio_codec.encode(clip, SAMPLE_RATE), waveform)
    mel, figures["mel decode, ms per clip"] = _timed(audio_codec.decode_mel, latents)
    heard, figures["Griffin-Lim, ms per clip"] = _timed(audio_codec.vocode, mel)
    errors = ((decoded.clamp(-1, 1) - video) / 2).square().flatten(1).mean(dim=1)
    figures["video PSNR, dB"] = float(-10 * errors.log10().mean())
    original = audio_codec.mel(waveform, SAMPLE_RATE)[:, :, : mel.shape[2]]
    figures["mel error, mean abs nats"] = float((mel - original).abs().mean())
    again = audio_codec.mel(heard, SAMPLE_RATE)[:, :, : mel.shape[2]]
    figures["mel error after Griffin-Lim"] = float((again - original).abs().mean())
    return figures | _sync_figures(clips, decoded, mel, heard)


def _sync_figures(clips: list[Clip], decoded: Tensor, mel: Tensor, heard: Tensor) -> dict[str, float]:
    truth, figures = [list(clip.impact_times) for clip in clips], {}
    seen = [sync.impacts(video, clips[0].fps) for video in decoded]
    onsets = {"mel": [sync.onsets(m) for m in mel], "waveform": [sync.waveform_onsets(w, SAMPLE_RATE) for w in heard]}
    pairs = {"impacts to truth": (truth, seen), "mel onsets to truth": (truth, onsets["mel"])}
    pairs |= {f"impacts to {name} onsets": (seen, times) for name, times in onsets.items()}
    for name, (first, second) in pairs.items():
        for tolerance in (0.03, 0.05, 0.08):
            figures[f"F1 +-{tolerance * 1000:.0f} ms, {name}"] = sync.f1_score(first, second, tolerance) or 0.0
        figures[f"mean abs error, ms, {name}"] = (sync.compare(first, second).mean_error or 0.0) * 1000
    for tolerance in (0.03, 0.05, 0.08):
        figures[f"chance +-{tolerance * 1000:.0f} ms"] = sync.chance_f1(seen, onsets["mel"], tolerance) or 0.0
    return figures


def _pair(clip: Clip) -> tuple[Tensor, Tensor]:
    video, waveform = clip_tensors(clip)
    assert waveform is not None, "a world without silent clips gave one"
    return video, waveform


def _timed(call: Callable[[Tensor], Tensor], clips: Tensor) -> tuple[Tensor, float]:
    """The results of `call`, clip by clip, and the median time of one in ms."""
    results, times = [], []
    for clip in clips.split(1):
        start = time.perf_counter()
        results.append(call(clip))
        times.append(1000 * (time.perf_counter() - start))
    return torch.cat(results), statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64, help="number of clips (default: 64; statistics: use 1024)")
    parser.add_argument("--size", type=int, default=64, help="frame width and height in pixels (default: 64)")
    parser.add_argument("--write-statistics", action="store_true", help="measure and write the channel statistics")
    options = parser.parse_args()
    if options.write_statistics:
        print(write_statistics(options.clips))
        return 0
    for name, figure in measure(options.clips, options.size).items():
        print(f"{figure:10.3f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
