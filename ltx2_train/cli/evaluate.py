"""`ltx2-evaluate`: what a run has learned, in figures: held-out loss, and clips whose sound should meet their picture."""

import argparse
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2_train.cli.runs import Trained
    from ltx2_train.data.datasets import LatentDataset
    from ltx2_train.distributed.world import World
    from ltx2_train.evals.heldout import Heldout, HeldoutConfig, HeldoutLosses
    from ltx2_train.evals.samples import SamplesConfig

DESCRIPTION = """\
Measure the newest complete checkpoint of a run on held-out clips.

Held-out loss: fixed clips, noise and noise levels, per modality, for the trained weights and for their moving average,
with a 95 % interval over clips. With --samples also clips sampled from held-out captions with the run's own sampler
profile: mp4 files beside the real clips, and figures of the sampled clips beside those of the real ones through the
codec (the ceiling): distance to the real latents, diversity, motion, loudness, silence, clipping, and how well sound and
picture agree in time, onset F1 beside chance (the same clips with exchanged sound).

Everything goes into RUN/evals, where ltx2-report finds it; that of further held-out datasets into RUN/evals/dataset_1
and so on. A file of other clips or of another setting is not replaced: name a folder with --out. In such a folder nothing
of another checkpoint is replaced either. Under torchrun the clips are shared by all processes; the held-out losses are the
same on any number of them. The model computes in the precision that the run trains in. Sampling that was killed is taken
up by the same command.

With --follow it is a job beside the training: every complete checkpoint is evaluated once, in the order of steps, until
that of the run's last step. It holds a checkpoint while it reads it, so that the run may remove it. A failure is told
and it goes on. On SIGTERM, SIGINT or SIGUSR1 the evaluation is finished and the program ends with 0; on a second one at
once."""
EPILOG = """\
examples:
  ltx2-evaluate outputs/demo/run                            held-out loss
  ltx2-evaluate outputs/demo/run --samples 64 --shown 4     and 64 sampled clips, four of them kept as mp4
  ltx2-evaluate RUN --samples 64 --seeds 4                  every caption four times: is one seed like another?
  ltx2-evaluate RUN --samples 64 --metrics onset_f1,loudness --tolerance-ms 50
  ltx2-evaluate RUN --follow --samples 64                   every checkpoint, while the run goes on elsewhere
  ltx2-evaluate RUN --data OTHER/heldout --out other        on another dataset, beside what the run has measured"""


EXIT_INTERRUPTED = 130
# The options that set what a measurement is of, by its names in the files.
HELDOUT_OPTIONS = {"clips": "--clips"}
SAMPLES_OPTIONS = {
    "clips": "--samples",
    "tolerance_ms": "--tolerance-ms",
    **{name: f"--{name}" for name in ("seed", "seeds", "profile", "weights")},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-evaluate", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run directory, or one checkpoint of it")
    p.add_argument("--data", metavar="DIR", help="one held-out latent dataset (all of evaluation.datasets)")
    p.add_argument("--clips", type=int, metavar="N", help="clips of the held-out loss (as in the run)")
    p.add_argument("--samples", type=int, default=0, metavar="N", help="held-out captions to sample (0: none)")
    p.add_argument("--shown", type=int, metavar="N", help="how many of them are kept as mp4 (as in the run, or 4)")
    p.add_argument("--batch-size", type=int, metavar="N", help="clips sampled together (as in the run, or 16)")
    p.add_argument("--seed", type=int, metavar="N", help="of the first sample, the next count up (as in the run, or 0)")
    p.add_argument("--seeds", type=int, metavar="N", help="samples of every caption (as in the run, or 1)")
    p.add_argument(
        "--metrics", type=_names, metavar="NAME,...", help="figures to make, or none (as in the run, or all)"
    )
    p.add_argument("--tolerance-ms", type=float, metavar="MS", help="of sound and picture (as in the run, or 80)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which are sampled (ema)")
    profile = "sampler profile, by name or a .yaml file of your own (the one stored with the run)"
    p.add_argument("--profile", metavar="NAME", help=profile)
    p.add_argument("--base", type=Path, metavar="PATH", help="the released weights the run started from (as it says)")
    p.add_argument("--out", type=Path, metavar="DIR", help="where everything goes, samples in samples-STEP (RUN/evals)")
    p.add_argument("--follow", action="store_true", help="evaluate every checkpoint until the run has ended")
    p.add_argument("--newest-first", action="store_true", help="with --follow: where it lags, the newest one next")
    p.add_argument("--poll-seconds", type=float, default=10, metavar="S", help="--follow looks as often (10)")
    return p


def _names(text: str) -> list[str]:
    return [] if text == "none" else [name.strip() for name in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 after an error that names the next action, 130 after an interruption."""
    options = parser().parse_args(argv)
    from ltx2_train.cli.follow import follow
    from ltx2_train.distributed.world import close_world, init_world
    from ltx2_train.errors import Ltx2Error

    world = init_world()
    try:
        for line in follow(options, world, evaluate) if options.follow else evaluate(options, world):
            if world.is_main:
                print(line, flush=True)
    except Ltx2Error as error:
        if world.is_main or not error.agreed:
            print(f"ltx2-evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    finally:
        close_world()
    return 0


def evaluate(options: argparse.Namespace, world: "World") -> Iterable[str]:
    """The lines to print. All ranks walk through them together."""
    from dataclasses import replace

    from ltx2_train.cli.runs import find_checkpoint, load_trained, run_directory
    from ltx2_train.distributed.world import agreed, from_main
    from ltx2_train.evals.heldout import HeldoutLosses, write_heldout

    agreed(world, lambda: _check(options))
    checkpoint = from_main(world, lambda: find_checkpoint(options.run))
    place = from_main(world, lambda: options.out or run_directory(options.run))
    common = {"profile_name": options.profile, "base": options.base, "device": world.device}
    trained = agreed(world, partial(load_trained, checkpoint, weights=options.weights, **common))
    trained = replace(trained, dtype=trained.job.engine.precision.dtype)  # as in the loop, and on any device alike
    tasks = agreed(world, partial(_tasks, options, place, trained, world))
    told = {"source": agreed(world, lambda: trained.source)}
    source = None if options.out is None else told["source"]
    agreed(world, lambda: _check_places(tasks, trained, source) if world.is_main else None)
    measured: list[dict[str, HeldoutLosses]] = [{} for _ in tasks]
    for weights in _kinds(trained):
        trained = replace(trained, weights=weights)  # with it goes the model that the last one was filled into
        for task, losses in zip(tasks, measured, strict=True):
            losses[weights] = task.heldout.measure(agreed(world, partial(getattr, trained, "model")))
            yield from _heldout_lines(trained, losses[weights], task.title)
    for task, losses in zip(tasks, measured, strict=True):
        write_heldout(task.heldout, task.heldout_path, trained.step, losses, told)
    for task in tasks:
        if task.samples is not None:
            yield from _sample(task.samples, trained, task, world, told)


def _kinds(trained: "Trained") -> list[str]:
    """The kinds of weights there are, those to be sampled last."""
    from ltx2_train.cli.runs import WEIGHTS

    kinds = WEIGHTS if trained.job.ema is not None else (trained.weights,)
    return sorted(kinds, key=lambda name: name == trained.weights)


@dataclass(frozen=True)
class _Task:
    """A held-out dataset: what is measured on it, and where that goes."""

    title: str  # what it is called beside others
    dataset: "LatentDataset"
    heldout: "Heldout"
    heldout_path: Path
    samples: "SamplesConfig | None"
    samples_directory: Path


def _check_places(tasks: Sequence[_Task], trained: "Trained", source: dict[str, str] | None) -> None:
    """Raises `ConfigError` where a file that would be replaced is of something else.

    `source`: the checkpoint that it must be of too; None: of any, as in the run's own folder.
    """
    from ltx2_train.evals.identity import check_same, check_source, heldout_of, read_contents, samples_of
    from ltx2_train.evals.samples import samples_identity

    for task in tasks:
        replaced = [(task.heldout_path, heldout_of, task.heldout.identity, HELDOUT_OPTIONS)]
        if task.samples is not None:
            made = (trained.profile, trained.streams, task.samples, trained.weights, trained.dtype)
            path = task.samples_directory / "samples.json"
            replaced.append((path, samples_of, samples_identity(task.dataset, *made), SAMPLES_OPTIONS))
        for path, identity_of, identity, options in replaced:
            if path.exists():
                contents = read_contents(path)
                if source is not None:
                    check_source(path, contents.get("source"), source)
                check_same(path, identity_of(contents), identity, options)


def _tasks(options: argparse.Namespace, place: Path, trained: "Trained", world: "World") -> "list[_Task]":
    """One per held-out dataset of the run; --data is the only one where given. `place`: --out, or the run directory."""
    from ltx2_train.diffusion.profiles import check_fits
    from ltx2_train.errors import ConfigError

    locations = [options.data] if options.data else trained.job.evaluation.datasets
    if not locations:
        raise ConfigError("the run names no held-out dataset (evaluation.datasets is empty); give --data DIR")
    samples = _samples_config(options, trained.job.evaluation.samples)
    if samples is not None:
        check_fits(trained.profile, trained.fit)
    tasks = []
    for i, location in enumerate(locations):
        dataset = _dataset(location, trained)
        heldout_path, samples_place = _places(options, place, i, trained.step)
        tasks.append(
            _Task(
                title=f"evaluation.datasets[{i}], " if i else "",
                dataset=dataset,
                heldout=_heldout(options, trained, dataset, world),
                heldout_path=heldout_path,
                samples=samples,
                samples_directory=samples_place,
            )
        )
    return tasks


def _places(options: argparse.Namespace, place: Path, number: int, step: int) -> tuple[Path, Path]:
    """The file of the held-out losses and the folder of the samples: where the run itself has them, or in --out."""
    from ltx2_train.evals.files import dataset_directory
    from ltx2_train.evals.heldout import heldout_name, heldout_path
    from ltx2_train.evals.samples import samples_directory, samples_name

    if options.out is not None:
        place = place / f"dataset_{number}" if number else place
        return place / heldout_name(step), place / samples_name(step)
    place = dataset_directory(place, number)
    return heldout_path(place, step), samples_directory(place, step)


def _check(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for an option out of its bound, before anything is opened."""
    _samples_config(options, None)
    _heldout_config(options, None)


def _samples_config(options: argparse.Namespace, of_run: "SamplesConfig | None") -> "SamplesConfig | None":
    """How clips are sampled, if they are: what is not given is as in the run. Raises `ConfigError`."""
    from dataclasses import replace

    from ltx2_train.evals.samples import SamplesConfig

    if not options.samples:
        return None
    names = ("shown", "batch_size", "seed", "seeds", "tolerance_ms", "metrics")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    with _named_by_options():
        return replace(of_run or SamplesConfig(), clips=options.samples, **given)


def _heldout_config(options: argparse.Namespace, of_run: "HeldoutConfig | None") -> "HeldoutConfig":
    from dataclasses import replace

    from ltx2_train.evals.heldout import HeldoutConfig

    config = of_run or HeldoutConfig()
    with _named_by_options():
        return config if options.clips is None else replace(config, clips=options.clips)


@contextmanager
def _named_by_options() -> Iterator[None]:
    """Has errors name options where the settings behind them are named."""
    from ltx2_train.errors import ConfigError

    def option(found: re.Match[str]) -> str:
        name = {"samples.clips": "samples", "heldout.clips": "clips"}.get(found[1], found[1].rpartition(".")[2])
        return f"--{name.replace('_', '-')} "

    try:
        yield
    except ConfigError as error:
        text = re.sub(r"^metrics=", "evaluation.samples.metrics=", str(error))
        raise ConfigError(re.sub(r"evaluation\.(\w+\.\w+)=", option, text)) from error


def _dataset(location: str, trained: "Trained") -> "LatentDataset":
    """A held-out dataset, made with the codecs and text encoder that the model knows."""
    from ltx2_train.data.datasets import check_compatible, open_dataset

    dataset = open_dataset(location)
    check_compatible(dataset.location, dataset.manifest, **trained.provenance)
    return dataset


def _heldout(options: argparse.Namespace, trained: "Trained", dataset: "LatentDataset", world: "World") -> "Heldout":
    from ltx2_train.diffusion.objective import Objective, ObjectiveConfig
    from ltx2_train.evals.heldout import Heldout

    config = _heldout_config(options, trained.job.evaluation.heldout)
    objective = Objective(ObjectiveConfig(streams=trained.job.objective.streams), None, trained.keyframe_marker)
    return Heldout(dataset, objective, config, world, trained.dtype)


def _heldout_lines(trained: "Trained", losses: "HeldoutLosses", title: str) -> Iterable[str]:
    """The mean losses of one kind of weights with their intervals, and what is to be said about them."""
    estimates = {modality: losses.mean(modality) for modality in ("video", "audio")}
    shown = (f"{modality} {_figure(found.to_dict(), 4)}" for modality, found in estimates.items() if found.count)
    yield f"step {trained.step}  {title}held-out loss, {trained.weights:<3} weights: {'  '.join(shown)}"
    yield from (f"  {modality}: {found.note}" for modality, found in estimates.items() if found.note)


def _sample(
    config: "SamplesConfig", trained: "Trained", task: _Task, world: "World", told: dict[str, Any]
) -> Iterable[str]:
    from ltx2_train.distributed.world import agreed
    from ltx2_train.evals.samples import Samples, Sampling

    dataset, directory = task.dataset, task.samples_directory

    def built() -> tuple[Samples, dict[str, Any]]:
        sampling = Sampling(
            profile=trained.profile,
            negative=dataset.known_null_text("sampling"),
            streams=trained.streams,
            keyframe_marker=trained.keyframe_marker,
            dtype=trained.dtype,
        )
        return Samples(dataset, sampling, trained.components.codecs(), config, world), trained.identity

    begin = time.perf_counter()
    samples, origin = agreed(world, built)
    summary = samples.run(
        trained.model, directory, step=trained.step, weights=trained.weights, origin=origin, told=told
    )
    seconds, made = time.perf_counter() - begin, summary["count"] - samples.taken_up
    if samples.taken_up:
        yield f"step {trained.step}  {task.title}{samples.taken_up} clips taken up from an evaluation that was broken off"
    yield f"step {trained.step}  {task.title}{made} clips sampled, decoded and measured in {seconds:.1f} s: {directory}"
    for name, figures in (summary["sync"] or {}).items():
        yield _sync_line(name, figures)
    yield from metrics_table(summary["metrics"])


def _sync_line(name: str, figures: dict[str, Any]) -> str:
    from ltx2_train.evals.history import number_of

    chance = "" if figures["chance"] is None else f"chance {figures['chance']:.3f}, "
    return (
        f"  {name:<8} onset F1 at ±{figures['tolerance_ms']:.0f} ms: {_figure({'value': figures['f1'], **figures}, 3)}  "
        f"({chance}{figures['impacts']} impacts seen, "
        f"{figures['onsets']} onsets heard, {figures['matched']} matched, {number_of(figures)})"
    )


def metrics_table(metrics: dict[str, dict[str, Any]]) -> Iterable[str]:
    """A line per metric: sampled, real, unit, clips, and what is to be said about the figure; of several once, below."""
    noted: dict[str, list[str]] = {}
    for name, found in metrics.items():
        noted.setdefault(found["sampled"]["note"], []).append(name)
    rows = [("", "sampled", "real", "unit", "clips", "")]
    for name, found in metrics.items():
        sampled, note = found["sampled"], found["sampled"]["note"]
        real = _figure(found["real"], 3) if "real" in found else ""
        own = note if len(noted[note]) == 1 else ""
        rows.append((name, _figure(sampled, 3), real, found["unit"], str(sampled["count"]), own))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows if metrics else []:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
    for note, names in noted.items():
        if note and len(names) > 1:
            yield f"  {note}" + ("" if len(names) == len(metrics) else f" ({', '.join(names)})")


def _figure(estimate: dict[str, Any], digits: int) -> str:
    """An estimate's value and interval; a dash where there is none."""
    return "–" if estimate["value"] is None else _interval(estimate["value"], estimate, digits)


def _interval(value: float, bounds: dict[str, Any], digits: int = 3) -> str:
    if bounds["low"] is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{bounds['low']:.{digits}f}, {bounds['high']:.{digits}f}]"


if __name__ == "__main__":
    sys.exit(main())
