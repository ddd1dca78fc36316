"""`ltx2-sample`: a prompt to an mp4 with sound, by the same sampler and profile as the evaluations of the run."""

import argparse
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2_train.cli.runs import Trained
    from ltx2_train.diffusion.generate import Request

DESCRIPTION = """\
Sample clips from prompts with a trained model: the newest complete checkpoint of a run, its moving average, the sampler
profile that is stored with it, and the codecs and text encoder its data was made with.

Size, length and frame rate are those of the training data unless they are given. A seed means the same on every
device; several prompts take seeds that count up."""
EPILOG = """\
examples:
  ltx2-sample outputs/demo/run --prompt "A red ball bounces on a dark blue floor."
  ltx2-sample outputs/demo/run --prompt "..." --seed 7 --count 4 --out clips
  ltx2-sample RUN --prompt "..." --frames 121 --width 768 --height 512 --fps 24 --steps 40"""
SIZES = ("frames", "width", "height", "fps")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-sample", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run directory, or one checkpoint of it")
    p.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="what to show; may be repeated")
    p.add_argument("--negative", default="", metavar="TEXT", help="what guidance pushes away from (the empty caption)")
    p.add_argument("--count", type=int, default=1, metavar="N", help="clips per prompt (1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the first clip (0)")
    p.add_argument("--frames", type=int, metavar="N", help="pixel frames, 8k + 1")
    p.add_argument("--width", type=int, metavar="N", help="pixels, a multiple of 32")
    p.add_argument("--height", type=int, metavar="N", help="pixels, a multiple of 32")
    p.add_argument("--fps", type=float, metavar="X", help="frames per second")
    p.add_argument("--no-audio", action="store_true", help="a silent clip")
    p.add_argument("--profile", metavar="NAME", help="sampler profile (the one stored with the run)")
    p.add_argument("--steps", type=int, metavar="N", help="sampler steps (those of the profile)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="moving average or trained weights (ema)")
    p.add_argument("--out", type=Path, metavar="DIR", help="where the mp4 files go (RUN/samples)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that names the next action."""
    options = parser().parse_args(argv)
    from ltx2_train.errors import Ltx2Error

    try:
        for line in sample(options):
            print(line, flush=True)
    except Ltx2Error as error:
        print(f"ltx2-sample: {error}", file=sys.stderr)
        return 2
    return 0


def sample(options: argparse.Namespace) -> Iterable[str]:
    """Samples, decodes and writes one clip after another; the lines to print."""
    import torch

    from ltx2_train.cli.runs import load_trained, run_directory
    from ltx2_train.diffusion.generate import generate
    from ltx2_train.media.write import write_mp4

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(options.run, weights=options.weights, profile_name=options.profile, device=device)
    profile, codecs, requests = _profile(options, trained), trained.codecs(), _requests(options, trained)
    yield f"step {trained.step}, {trained.weights} weights, profile {profile.name} ({profile.steps} steps), on {device}"
    directory = options.out or run_directory(options.run) / "samples"
    for prompt, request in requests:
        begin = time.perf_counter()
        latents = generate(
            trained.model,
            request,
            profile,
            device=device,
            dtype=trained.dtype,
            keyframe_marker=trained.keyframe_marker,
        )
        assert latents.video is not None, "a request of this program has a picture"
        audio = None if latents.audio is None else latents.audio[0]
        film = codecs.decode(latents.video[0], audio, request.fps)
        assert film.video is not None
        path = directory / f"{_file_name(prompt)}-{request.seed}.mp4"
        write_mp4(path, film.video, film.fps, film.waveform, film.sample_rate)
        yield f"{path}  ({film.seconds:.1f} s of film in {time.perf_counter() - begin:.1f} s)"


def _profile(options: argparse.Namespace, trained: "Trained") -> Any:
    from dataclasses import replace

    return trained.profile if options.steps is None else replace(trained.profile, steps=options.steps)


def _requests(options: argparse.Namespace, trained: "Trained") -> list[tuple[str, "Request"]]:
    """(prompt, request) of every clip."""
    from ltx2_train.diffusion.generate import Request
    from ltx2_train.errors import ConfigError

    if options.count < 1 or not all(prompt.strip() for prompt in options.prompt):
        raise ConfigError("--prompt needs a text and --count at least 1")
    *texts, negative = trained.text_encoder().encode([*options.prompt, options.negative])
    size = _size(options, trained)
    pairs = [(prompt, text) for prompt, text in zip(options.prompt, texts, strict=True) for _ in range(options.count)]
    return [
        (prompt, Request(text=text, negative=negative, seed=options.seed + i, has_audio=not options.no_audio, **size))
        for i, (prompt, text) in enumerate(pairs)
    ]


def _size(options: argparse.Namespace, trained: "Trained") -> dict[str, Any]:
    """Frames, width, height and fps: as given, otherwise as most of the training data."""
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    return given if len(given) == len(SIZES) else _data_size(trained) | given


def _data_size(trained: "Trained") -> dict[str, Any]:
    """The size of the most frequent clips of the run's first dataset."""
    import numpy as np

    from ltx2_train.data.datasets import open_dataset
    from ltx2_train.errors import ConfigError, DataError
    from ltx2_train.geometry import SPACE_SCALE, pixel_frames

    try:
        dataset = open_dataset(trained.job.data.datasets[0].path)
    except DataError as error:
        needed = ", ".join(f"--{name}" for name in SIZES)
        raise ConfigError(f"the size of the training data is not known ({error}). Give {needed}") from error
    index = dataset.index
    common = int(np.argmax(index.bucket_counts * [bucket.frames > 1 for bucket in index.buckets]))
    bucket = index.buckets[common]
    fps = dataset.read(int(np.argmax(index.bucket_ids == common))).fps
    width, height = bucket.width * SPACE_SCALE, bucket.height * SPACE_SCALE
    return {"frames": pixel_frames(bucket.frames), "width": width, "height": height, "fps": fps}


def _file_name(prompt: str) -> str:
    """The beginning of the prompt as a file name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "sample"


if __name__ == "__main__":
    sys.exit(main())
