"""`ltx2-sample`: requests to clips with sound, by the same sampler and profile as the evaluations of the run."""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ltx2_train.cli.components import ComponentsConfig
    from ltx2_train.cli.released import Released
    from ltx2_train.cli.runs import Trained
    from ltx2_train.diffusion.profiles import SamplerProfile
    from ltx2_train.distributed.world import World
    from ltx2_train.evals.clips import ClipMaker, Progress
    from ltx2_train.evals.planning import Batch, Ground, Outcome
    from ltx2_train.evals.requests import Asked, ClipRequest
    from ltx2_train.record import TextFeatures

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Make clips from prompts: with a trained model, the newest complete checkpoint of a run, its moving average, the sampler
profile that is stored with it, and the codecs and text encoder its data was made with; or with weights in a file, released
or exported ones, as they are or with LoRA files added. What ltx2-export wrote says which profile and parts belong to it.

A prompt alone gives picture and sound, or the one of them that the run was trained on; of --frames 1 the picture alone,
unless wav is asked for. An --image becomes the first frame. An --audio file is kept as the sound, and a
picture is generated to it; a --video file is kept as the picture, and sound is generated to it. What is given is written
as it came, cropped and cut to the clip, and not as the codec would show it; the first frame comes out of the codec.

Many clips stand in a file of requests, one per line, whose fields are called as the options are here: prompt, negative,
seed, count, frames, width, height, fps, image, image_crf, audio, video, fit, silent (--no-audio), profile, steps, format,
name. Options given beside it hold for every request that does not say otherwise; its files lie relative to it.

Under torchrun the clips are shared by all processes; each has the whole model. A clip that cannot be made is named with
its reason at the end, and the others are made. Beside the media of a clip, NAME.json says how it was made; it is written
last. A clip whose NAME.json fits its request and model is not made again, so a killed command can be repeated.

Size, length and frame rate are those of the training data, and 121 frames of 768 x 512 at 24 per second for published
weights, unless they are given; beside --video the frame rate is that of the file. A seed means the same on every device
and in every batch."""
EPILOG = """\
examples:
  prompts      ltx2-sample RUN --prompt "A red ball bounces on a dark blue floor." --seed 7 --count 4 --out clips
  larger       ltx2-sample RUN --prompt "..." --frames 121 --width 768 --height 512 --fps 24 --steps 40
  first frame  ltx2-sample RUN --prompt "The ball begins to roll." --image ball.png
  to a sound   ltx2-sample RUN --prompt "A drummer on a stage." --audio drums.flac --fit
  to a film    ltx2-sample RUN --prompt "Steps on gravel." --video walk.mp4 --format mp4,wav
  many         ltx2-sample RUN --requests clips.jsonl --batch-size 4 --out clips
  many GPUs    launch/torchrun.sh -m ltx2_train.cli.sample RUN --requests clips.jsonl --out clips
  released     ltx2-sample ltx-2.3.safetensors --text-encoder gemma-3-12b --prompt "..." --lora mine.safetensors:0.8
  in parts     ltx2-sample ltx-2.5.safetensors --vae VAE --audio-codec AUDIO --text-encoder FOLDER --text-weights FILE \
                 --prompt "..."

a line of clips.jsonl:
  {"prompt": "A drummer on a stage.", "audio": "drums.flac", "fit": true, "seed": 3, "format": ["mp4", "png"]}

exit status: 0 all clips are there; 1 some could not be made; 2 none, or an option is wrong"""
# Seconds that a process which is done waits for the others. It is as long as shares can differ: where one process can
# open nothing, it waits for all clips of another. One that dies ends the others at once; this is for one that hangs.
PATIENCE = 86400.0
EXIT_SOME, EXIT_NONE = 1, 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-sample", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "run directory, one checkpoint of it, or released weights (a file, an index, a folder of diffusers)"
    p.add_argument("model", type=Path, metavar="MODEL", help=what)
    asked = p.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; may be repeated")
    asked.add_argument("--requests", type=Path, metavar="FILE", help="requests, one per line (.jsonl), or a .yaml list")
    _add_request_options(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="where the files go (RUN/samples, or ./samples)")
    p.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="clips of one size that are sampled together (1)"
    )
    p.add_argument(
        "--passes-at-once",
        type=int,
        metavar="N",
        help="passes of guidance in one forward: fewer need less memory (all)",
    )
    p.add_argument(
        "--tile", type=_tile, metavar="SIZE,OVERLAP", help="decode pictures in pieces of so many pixels: less memory"
    )
    _add_model_options(p)
    return p


def _add_request_options(p: argparse.ArgumentParser) -> None:
    """What a request may say too; None where it is left open."""
    g = p.add_argument_group("of every clip")
    g.add_argument("--negative", metavar="TEXT", help="what guidance pushes away from (the empty caption)")
    g.add_argument("--seed", type=int, metavar="N", help="of the first clip of a prompt (0)")
    g.add_argument("--count", type=int, metavar="N", help="clips per prompt, with seeds that count up (1)")
    g.add_argument("--frames", type=int, metavar="N", help="pixel frames, 8k + 1")
    g.add_argument("--width", type=int, metavar="N", help="pixels, a multiple of 32")
    g.add_argument("--height", type=int, metavar="N", help="pixels, a multiple of 32")
    g.add_argument("--fps", type=float, metavar="X", help="frames per second")
    g.add_argument("--image", metavar="FILE", help="the first frame, a picture or a film that begins with it")
    crf = "compress it as H.264 first, at this quality; programs of released models take 33, from 2.4 on 18 (not)"
    g.add_argument("--image-crf", type=int, metavar="N", help=crf)
    g.add_argument("--audio", metavar="FILE", help="the sound, to which a picture is generated")
    g.add_argument("--video", metavar="FILE", help="the picture, to which sound is generated")
    fit = "cut the clip to the given sound or picture where that is shorter"
    g.add_argument("--fit", action="store_true", default=None, help=fit)
    g.add_argument("--no-audio", action="store_true", default=None, dest="silent", help="a silent clip")
    profile = "sampler profile, by name or a .yaml file of your own (the one stored with MODEL)"
    g.add_argument("--profile", metavar="NAME", help=profile)
    g.add_argument(
        "--steps", type=int, metavar="N", help="sampler steps (those of the profile); heun, res_2s: two calls each"
    )
    g.add_argument("--format", metavar="F,F", help="mp4, wav, png (a folder of pictures); several by commas (mp4)")
    g.add_argument("--name", metavar="NAME", help="of the files, before -SEED (the beginning of the prompt)")


def _add_model_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("model")
    g.add_argument("--weights", choices=("ema", "raw"), default="ema", help="moving average or trained weights (ema)")
    g.add_argument("--base", type=Path, metavar="PATH", help="the released weights that RUN started from (as it says)")
    g.add_argument(
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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when some clips could not be made, 2 when none could or after an error of the options."""
    options = parser().parse_args(argv)
    from ltx2_train.distributed.world import close_world, init_world
    from ltx2_train.errors import Ltx2Error

    world = init_world(timeout_seconds=PATIENCE)
    try:
        return sample(options, world)
    except Ltx2Error as error:
        if world.is_main or not error.agreed:
            _print(f"ltx2-sample: {error}", sys.stderr)
        return EXIT_NONE
    finally:
        close_world()


def sample(options: argparse.Namespace, world: "World") -> int:
    """Plans on the first rank, makes this rank's share of the clips, and tells of all of them. The exit status.

    Between the plan and the end the ranks know nothing of each other, so that none can wait for another: whatever fails
    in one becomes an outcome, and the last thing all of them do is to exchange these.
    """
    from ltx2_train.distributed.world import agreed, from_main
    from ltx2_train.evals.planning import plan, share

    asked = agreed(world, lambda: read_asked(options))
    checkpoint = from_main(world, lambda: find_model(options))
    source = agreed(world, lambda: open_model(options, checkpoint, world.device))
    directory = _directory(options)

    def planned() -> tuple[list[list["Batch"]], list["Outcome"]]:
        clips, known = plan(asked, _ground(options, source), directory)
        return share(clips, options.batch_size, world.size), known

    shares, known = world.broadcast_object(agreed(world, lambda: planned() if world.is_main else ([], [])))
    _say(world, f"{source.title}, profile {source.profile.name}, on {world.device.type}", first_only=True)
    outcomes = list(known) if world.is_main else []
    for progress in _made(options, source, shares[world.rank], directory, world):
        outcomes.append(progress.outcome)
        if progress.film_seconds:
            _say(world, _line(progress))
    everyone = [outcome for part in world.gather_objects(outcomes) for outcome in part]
    return _summary(everyone, world)


def read_asked(options: argparse.Namespace) -> list["Asked"]:
    """The clips that are asked for. Raises `ConfigError` for what is no request, before anything is loaded."""
    from dataclasses import fields

    from ltx2_train.errors import ConfigError
    from ltx2_train.evals.requests import ClipRequest, check_names, expanded, read_requests, split_formats

    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be >= 1")
    if options.passes_at_once is not None and options.passes_at_once < 1:
        raise ConfigError(f"--passes-at-once {options.passes_at_once}: must be >= 1; leave it out for all of a step")
    names = {f.name for f in fields(ClipRequest)} - {"prompt", "profile"}  # the profile is that of the model
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.format is not None:
        given["format"] = split_formats(options.format)
    if options.requests is not None:
        asked = read_requests(options.requests, given)
    else:
        asked = [one for text in options.prompt for one in expanded(f"--prompt {text!r}", {**given, "prompt": text})]
    check_names(asked)
    return asked


def _ground(options: argparse.Namespace, source: "Trained | Released") -> "Ground":
    """What the requests are held against."""
    from ltx2_train.evals.planning import Ground

    return Ground(
        identity={
            **source.identity,
            "streams": sorted(source.streams),
            "dtype": str(source.dtype),
            "tile": options.tile and list(options.tile),
        },
        streams=source.streams,
        size=cache(lambda: _size(source)),
        profile=lambda request: _profile(request, source),
    )


def _made(
    options: argparse.Namespace,
    source: "Trained | Released",
    batches: Sequence["Batch"],
    directory: Path,
    world: "World",
) -> Iterator["Progress"]:
    """This rank's clips, one after another. Where the parts around the model cannot be opened, all of them have failed."""
    from ltx2_train.evals.clips import Progress, failure

    if not batches:
        return
    try:
        maker = _maker(options, source, batches, directory, world)
    except Exception as error:
        yield from (Progress(failure(clip, error)) for batch in batches for clip in batch.clips)
        return
    for batch in batches:
        yield from maker.make(batch)


def _maker(
    options: argparse.Namespace,
    source: "Trained | Released",
    batches: Sequence["Batch"],
    directory: Path,
    world: "World",
) -> "ClipMaker":
    """The parts that make clips, brought to the device one after another: text encoder, then codecs, then the model."""
    from ltx2_train.codecs.residence import rest
    from ltx2_train.evals.clips import ClipMaker

    texts = _texts(source, batches)
    _free()  # the text encoder, which is as large as the model, before that is filled
    codecs = source.components.codecs(options.tile)
    rest(codecs.video, codecs.audio)
    return ClipMaker(
        source.model,
        codecs,
        texts,
        directory,
        device=world.device,
        dtype=source.dtype,
        keyframe_marker=source.keyframe_marker,
        passes_at_once=options.passes_at_once,
        told={"model": source.title},
    )


def _texts(source: "Trained | Released", batches: Sequence["Batch"]) -> Mapping[str, "TextFeatures"]:
    """Features of every prompt and negative prompt, each encoded once."""
    requests = [clip.request for batch in batches for clip in batch.clips]
    texts = list(dict.fromkeys(text for request in requests for text in (request.prompt, request.negative)))
    return dict(zip(texts, source.components.text_encoder().encode(texts), strict=True))


def _line(progress: "Progress") -> str:
    """One clip that is done."""
    together = f", {progress.batch_size} together" if progress.batch_size > 1 else ""
    return (
        f"{progress.outcome.detail}  ({progress.film_seconds:.1f} s of film in {progress.seconds:.1f} s; "
        f"{progress.step_seconds:.3f} s per step{together})"
    )


def _say(world: "World", line: str, *, first_only: bool = False) -> None:
    if world.is_main or not first_only:
        _print(line if world.size == 1 or first_only else f"[rank {world.rank}] {line}", sys.stdout)


def _print(line: str, stream: TextIO) -> None:
    """Tells a line. It never raises: a process that ended where it tells would leave the others waiting for it."""
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError) as error:  # closed at the other end, full, or letters that it has not
        logger.warning("not told (%s): %r", error, line)


def _summary(outcomes: Sequence["Outcome"], world: "World") -> int:
    """Tells what became of the clips, on the first rank; the exit status, on all of them."""
    from ltx2_train.evals.planning import State

    by_state = {state: [one for one in outcomes if one.state == state] for state in State}
    failed, there = by_state[State.failed], by_state[State.there]
    if world.is_main:
        for detail in dict.fromkeys(one.detail for one in failed):
            first, *others = [one for one in failed if one.detail == detail]
            more = f" and {len(others)} more" if others else ""
            _print(f"ltx2-sample: {first.where} ({first.name}){more}: {detail}", sys.stderr)
        if len(outcomes) > 1 or there:
            counts = f"{len(by_state[State.made])} made, {len(there)} there already, {len(failed)} failed"
            _say(world, f"{len(outcomes)} clips: {counts}", first_only=True)
    if not failed:
        return 0
    return EXIT_NONE if len(failed) == len(outcomes) else EXIT_SOME


def find_model(options: argparse.Namespace) -> Path | None:
    """The checkpoint that is sampled, for all processes: a run may save while they start. None for released weights."""
    from ltx2_train.cli.runs import find_checkpoint

    return find_checkpoint(options.model) if is_run(options.model) else None


def open_model(options: argparse.Namespace, checkpoint: Path | None, device: Any) -> "Trained | Released":
    """What is sampled: a checkpoint, or without one the released weights that the options name."""
    from ltx2_train.cli.released import load_released
    from ltx2_train.cli.runs import load_trained
    from ltx2_train.errors import ConfigError

    common: dict[str, Any] = {"profile_name": options.profile, "components": _components(options), "device": device}
    if checkpoint is None:
        if options.base is not None:
            raise ConfigError(f"--base {options.base}: {options.model} is no run. Drop --base")
        return load_released(options.model, loras=[_lora(text) for text in options.lora], **common)
    if options.lora:
        raise ConfigError(
            f"--lora goes with a file of weights: make one of the run first (ltx2-export {options.model} --to transformer "
            "--out FILE.safetensors), and give that in its place"
        )
    return load_trained(checkpoint, weights=options.weights, base=options.base, **common)


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


def _profile(request: "ClipRequest", source: "Trained | Released") -> "SamplerProfile":
    """The profile of a request: its own, or that of the model, with its own number of steps."""
    from dataclasses import replace

    from ltx2_train.diffusion.profiles import check_fits, profile

    chosen = source.profile if request.profile is None else profile(request.profile)
    check_fits(chosen, source.fit)
    return chosen if request.steps is None else replace(chosen, steps=request.steps)


def _size(source: "Trained | Released") -> Mapping[str, Any]:
    """Frames, width, height and fps where they are not given: as most of the training data."""
    from ltx2_train.cli.released import Released
    from ltx2_train.cli.runs import data_size

    return source.size if isinstance(source, Released) else data_size(source.job)


if __name__ == "__main__":
    sys.exit(main())
