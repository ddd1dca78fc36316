"""`ltx2-sample`: a prompt to an mp4 with sound, by the same sampler and profile as the evaluations of the run."""

import argparse
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2_train.cli.components import ComponentsConfig
    from ltx2_train.cli.released import Released
    from ltx2_train.cli.runs import Trained
    from ltx2_train.diffusion.generate import Request

DESCRIPTION = """\
Sample clips from prompts: with a trained model, the newest complete checkpoint of a run, its moving average, the sampler
profile that is stored with it, and the codecs and text encoder its data was made with; or with released weights, as they
are or with LoRA files added.

Size, length and frame rate are those of the training data, and 121 frames of 768 x 512 at 24 per second for released
weights, unless they are given. A seed means the same on every device; several prompts take seeds that count up."""
EPILOG = """\
examples:
  ltx2-sample outputs/demo/run --prompt "A red ball bounces on a dark blue floor."
  ltx2-sample outputs/demo/run --prompt "..." --seed 7 --count 4 --out clips
  ltx2-sample RUN --prompt "..." --frames 121 --width 768 --height 512 --fps 24 --steps 40
  ltx2-sample ltx-2.3.safetensors --text-encoder gemma-3-12b --prompt "..." --lora mine.safetensors:0.8
  ltx2-sample ltx-2.5.safetensors --vae VAE --audio-codec AUDIO --text-encoder FOLDER --text-weights FILE --prompt "..."
"""
SIZES = ("frames", "width", "height", "fps")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-sample", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "run directory, one checkpoint of it, or released weights (a file, an index, a folder of diffusers)"
    p.add_argument("model", type=Path, metavar="MODEL", help=what)
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
    p.add_argument("--base", type=Path, metavar="PATH", help="the released weights that RUN started from (as it says)")
    p.add_argument(
        "--tile", type=_tile, metavar="SIZE,OVERLAP", help="decode pictures in pieces of so many pixels: less memory"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="where the mp4 files go (RUN/samples, or ./samples)")
    p.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:X]", help="LoRA on released weights, strength X (1)"
    )
    parts = p.add_argument_group(
        "released parts, where they do not lie where the data's encoding found them, or in MODEL"
    )
    parts.add_argument("--video-codec", "--vae", metavar="PATH", help="file or folder with the video VAE")
    parts.add_argument("--audio-codec", metavar="PATH", help="file or folder with the audio VAE")
    parts.add_argument("--vocoder", metavar="PATH", help="file or folder with the vocoder (beside the audio VAE)")
    parts.add_argument("--text-encoder", "--text", metavar="DIR", help="local folder of the language model")
    parts.add_argument("--text-weights", metavar="PATH", help="file or folder with the text projection")
    parts.add_argument(
        "--connectors", metavar="PATH", help="file or folder with the connectors, for runs on stored contexts"
    )
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

    from ltx2_train.diffusion.generate import generate
    from ltx2_train.media.write import write_mp4

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = open_model(options, device)
    profile, requests = _profile(options, source), _requests(options, source)
    _free()  # the text encoder, which is as large as the model, before that is filled
    model, codecs = source.model, source.components.codecs(options.tile)
    yield f"{source.title}, profile {profile.name} ({profile.steps} steps), on {device}"
    directory = _directory(options)
    for prompt, request in requests:
        begin = time.perf_counter()
        latents = generate(
            model,
            request,
            profile,
            device=device,
            dtype=source.dtype,
            keyframe_marker=source.keyframe_marker,
        )
        assert latents.video is not None, "a request of this program has a picture"
        audio = None if latents.audio is None else latents.audio[0]
        film = codecs.decode(latents.video[0], audio, request.fps)
        assert film.video is not None
        path = directory / f"{_file_name(prompt)}-{request.seed}.mp4"
        write_mp4(path, film.video, film.fps, film.waveform, film.sample_rate)
        yield f"{path}  ({film.seconds:.1f} s of film in {time.perf_counter() - begin:.1f} s)"


def open_model(options: argparse.Namespace, device: str) -> "Trained | Released":
    """What is sampled: a run where the directory is one, released weights otherwise."""
    from ltx2_train.cli.released import load_released
    from ltx2_train.cli.runs import load_trained
    from ltx2_train.errors import ConfigError

    common: dict[str, Any] = {"profile_name": options.profile, "components": _components(options), "device": device}
    if not is_run(options.model):
        if options.base is not None:
            raise ConfigError(f"--base {options.base}: {options.model} is no run. Drop --base")
        return load_released(options.model, loras=[_lora(text) for text in options.lora], **common)
    if options.lora:
        raise ConfigError("--lora goes with released weights; export the run first (ltx2-export) to add a LoRA to it")
    return load_trained(options.model, weights=options.weights, base=options.base, **common)


def _free() -> None:
    """Gives back the memory of what is no longer used."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_run(path: Path) -> bool:
    """Whether a path is for `load_trained`: a run directory, or a checkpoint of one."""
    return (path / "config.yaml").exists() or (path / "checkpoints").is_dir() or (path / "manifest.json").exists()


def _components(options: argparse.Namespace) -> "ComponentsConfig":
    from dataclasses import fields

    from ltx2_train.cli.components import ComponentsConfig

    return ComponentsConfig(**{f.name: getattr(options, f.name) for f in fields(ComponentsConfig)})


def _lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH."""
    name, colon, strength = text.rpartition(":")
    try:
        return (Path(name), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:  # a colon of the name itself
        return Path(text), 1.0


def _tile(text: str) -> tuple[int, int]:
    size, overlap = map(int, text.split(","))
    return size, overlap


def _directory(options: argparse.Namespace) -> Path:
    from ltx2_train.cli.runs import run_directory

    if options.out is not None:
        return options.out
    return run_directory(options.model) / "samples" if is_run(options.model) else Path("samples")


def _profile(options: argparse.Namespace, source: "Trained | Released") -> Any:
    from dataclasses import replace

    return source.profile if options.steps is None else replace(source.profile, steps=options.steps)


def _requests(options: argparse.Namespace, source: "Trained | Released") -> list[tuple[str, "Request"]]:
    """(prompt, request) of every clip."""
    from ltx2_train.diffusion.generate import Request
    from ltx2_train.errors import ConfigError

    if options.count < 1 or not all(prompt.strip() for prompt in options.prompt):
        raise ConfigError("--prompt needs a text and --count at least 1")
    *texts, negative = source.components.text_encoder().encode([*options.prompt, options.negative])
    size = _size(options, source)
    pairs = [(prompt, text) for prompt, text in zip(options.prompt, texts, strict=True) for _ in range(options.count)]
    return [
        (prompt, Request(text=text, negative=negative, seed=options.seed + i, has_audio=not options.no_audio, **size))
        for i, (prompt, text) in enumerate(pairs)
    ]


def _size(options: argparse.Namespace, source: "Trained | Released") -> dict[str, Any]:
    """Frames, width, height and fps: as given, otherwise as most of the training data."""
    from ltx2_train.cli.released import Released

    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    if len(given) == len(SIZES):
        return given
    return (source.size if isinstance(source, Released) else _data_size(source)) | given


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
