"""Write a small world of real media files: balls that fall and bounce, and click at each impact.

Every clip is an H.264 + AAC mp4 (a share of them silent, a share single png images) beside `metadata.jsonl`, which holds
the captions and, as ground truth, the impact times. Clips depend on the seed alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import console
from data_prep.jobs import process_pool
from data_prep.tars import write_jsonl
from ltx2_train.data.synthetic import SAMPLE_RATE, Clip, WorldConfig, bounce_clip
from ltx2_train.errors import ConfigError
from ltx2_train.media.write import write_mp4, write_png
from ltx2_train.rng import derive_seed

METADATA_NAME = "metadata.jsonl"
CLIPS_PER_TASK = 16
CRF = 14  # x264 quality: the balls' edges stay sharp


def write_world(directory: Path, clips: int, seed: int, config: WorldConfig, workers: int = 1) -> Path:
    """Write `clips` clips and their metadata file; returns its path. The files do not depend on `workers`."""
    if clips < 1:
        raise ConfigError(f"clips: {clips}; need at least 1")
    directory.mkdir(parents=True, exist_ok=True)
    tasks = [
        (directory, range(at, min(at + CLIPS_PER_TASK, clips)), seed, config) for at in range(0, clips, CLIPS_PER_TASK)
    ]
    if workers == 1 or len(tasks) == 1:
        parts = [_write_clips(*task) for task in tasks]
    else:
        with process_pool(min(workers, len(tasks))) as pool:
            parts = list(pool.map(_write_clips, *zip(*tasks, strict=True)))
    path = directory / METADATA_NAME
    write_jsonl(path, (row for part in parts for row in part))
    return path


def _write_clips(directory: Path, numbers: range, seed: int, config: WorldConfig) -> list[dict[str, Any]]:
    return [_write_clip(directory, number, seed, config) for number in numbers]


def _write_clip(directory: Path, number: int, seed: int, config: WorldConfig) -> dict[str, Any]:
    """Write one clip; returns its row of the metadata."""
    clip = bounce_clip(derive_seed("synth", seed, number), config)
    name = f"clip-{number:06d}{'.png' if len(clip.video) == 1 else '.mp4'}"
    if len(clip.video) == 1:
        write_png(directory / name, clip.video[0])
    else:
        write_mp4(directory / name, clip.video, clip.fps, clip.waveform, SAMPLE_RATE, crf=CRF)
    return _row(name, clip)


def _row(name: str, clip: Clip) -> dict[str, Any]:
    return {
        "video": name,
        "caption": clip.caption,
        "impact_times": [round(time, 6) for time in clip.impact_times],
        "color": clip.color,
        "background": clip.background,
        "has_audio": clip.has_audio,
    }


def main(argv: Sequence[str] | None = None) -> None:
    defaults = WorldConfig()
    parser = console.parser("synth", __doc__ or "", "python -m data_prep.synth --out world --clips 2000 --seed 0")
    parser.add_argument("--out", type=Path, required=True, help="directory for the files and metadata.jsonl")
    parser.add_argument("--clips", type=int, required=True, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world")
    parser.add_argument("--width", type=int, default=defaults.width, help="pixels")
    parser.add_argument("--height", type=int, default=defaults.height, help="pixels")
    parser.add_argument("--frames", type=int, default=defaults.frames, help="of a clip")
    parser.add_argument("--fps", type=float, default=defaults.fps, help="frames per second")
    parser.add_argument("--silent-fraction", type=float, default=0.02, help="share of clips without an audio track")
    parser.add_argument("--image-fraction", type=float, default=0.02, help="share of single images")
    console.add_workers(parser)
    options = parser.parse_args(argv)
    config = WorldConfig(
        width=options.width,
        height=options.height,
        frames=options.frames,
        fps=options.fps,
        silent_fraction=options.silent_fraction,
        image_fraction=options.image_fraction,
    )
    path = write_world(options.out, options.clips, options.seed, config, options.workers)
    print(f"{options.clips} clips and their captions: {path}")


if __name__ == "__main__":
    console.run(main)
