"""`ltx2-evaluate`: what a run has learned, in figures: held-out loss, and clips whose sound should meet their picture."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2_train.cli.runs import Trained
    from ltx2_train.data.datasets import LatentDataset
    from ltx2_train.distributed.world import World
    from ltx2_train.evals.heldout import Heldout, HeldoutLosses
    from ltx2_train.evals.samples import SamplesConfig

DESCRIPTION = """\
Measure the newest complete checkpoint of a run on held-out clips.

Held-out loss: fixed clips, noise and noise levels, per modality, for the trained weights and for their moving average,
with a 95 % interval over clips. With --samples also clips sampled from held-out captions with the run's own sampler
profile: mp4 files beside the real clips, and figures of the sampled clips beside those of the real ones through the
codec (the ceiling): distance to the real latents, diversity, motion, loudness, silence, clipping, and how well sound and
picture agree in time, onset F1 beside chance (the same clips with exchanged sound).

Everything goes into RUN/evals, where ltx2-report finds it. Under torchrun the clips are shared by all processes;
the held-out losses are the same on any number of them. Sampling that was killed is taken up by the same command.

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
  ltx2-evaluate RUN --data OTHER/heldout --profile demo     on another dataset, with another sampler profile"""


EXIT_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-evaluate", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run directory, or one checkpoint of it")
    p.add_argument("--data", metavar="DIR", help="held-out latent dataset (evaluation.datasets of the run)")
    p.add_argument("--clips", type=int, metavar="N", help="clips of the held-out loss (as in the run)")
    p.add_argument("--samples", type=int, default=0, metavar="N", help="held-out captions to sample (0: none)")
    p.add_argument("--shown", type=int, default=4, metavar="N", help="how many of them are kept as mp4 (4)")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="clips sampled together (16)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the first sampled clip; the next count up (0)")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="samples of every caption (1)")
    p.add_argument("--metrics", type=_names, metavar="NAME,...", help="figures to make of them, or none (all)")
    p.add_argument("--tolerance-ms", type=float, metavar="MS", help="within which sound meets picture (80)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which are sampled (ema)")
    p.add_argument("--profile", metavar="NAME", help="sampler profile (the one stored with the run)")
    p.add_argument("--base", type=Path, metavar="PATH", help="the released weights the run started from (as it says)")
    p.add_argument("--out", type=Path, metavar="DIR", help="where samples go (RUN/evals/samples-STEP)")
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
    from ltx2_train.cli.runs import WEIGHTS, find_checkpoint, load_trained, run_directory
    from ltx2_train.distributed.world import agreed, from_main
    from ltx2_train.evals.heldout import write_heldout
    from ltx2_train.evals.samples import samples_directory

    samples = agreed(world, lambda: _samples_config(options))
    checkpoint, run_dir = from_main(world, lambda: (find_checkpoint(options.run), run_directory(options.run)))
    measured = {}
    for weights in sorted(WEIGHTS, key=lambda name: name == options.weights):  # those to be sampled come last
        common = {"profile_name": options.profile, "base": options.base, "device": world.device}
        trained = agreed(world, partial(load_trained, checkpoint, weights=weights, **common))
        dataset = agreed(world, partial(_dataset, options, trained))
        if trained.weights == weights:  # a run without a moving average has one kind only
            heldout = agreed(world, partial(_heldout, options, trained, dataset, world))
            measured[weights] = heldout.measure(agreed(world, partial(getattr, trained, "model")))
            yield from _heldout_lines(trained, measured[weights])
    write_heldout(heldout, run_dir, trained.step, measured)
    if samples is not None:
        directory = options.out or samples_directory(run_dir, trained.step)
        yield from _sample(samples, trained, dataset, world, directory)


def _samples_config(options: argparse.Namespace) -> "SamplesConfig | None":
    """How clips are sampled, if they are. Raises `ConfigError`, before anything is measured."""
    from ltx2_train.evals.samples import SamplesConfig

    names = ("shown", "batch_size", "seed", "seeds", "tolerance_ms", "metrics")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return SamplesConfig(clips=options.samples, **given) if options.samples else None


def _dataset(options: argparse.Namespace, trained: "Trained") -> "LatentDataset":
    """The held-out dataset, made with the codecs and text encoder that the model knows."""
    from ltx2_train.data.datasets import check_compatible, open_dataset
    from ltx2_train.errors import ConfigError

    locations = [options.data] if options.data else trained.job.evaluation.datasets
    if not locations:
        raise ConfigError("the run names no held-out dataset (evaluation.datasets is empty); give --data DIR")
    dataset = open_dataset(locations[0])
    check_compatible(dataset.location, dataset.manifest, **trained.provenance)
    return dataset


def _heldout(options: argparse.Namespace, trained: "Trained", dataset: "LatentDataset", world: "World") -> "Heldout":
    from dataclasses import replace

    from ltx2_train.diffusion.objective import Objective, ObjectiveConfig
    from ltx2_train.evals.heldout import Heldout, HeldoutConfig

    config = trained.job.evaluation.heldout or HeldoutConfig()
    config = replace(config, clips=options.clips) if options.clips is not None else config
    objective = Objective(ObjectiveConfig(streams=trained.job.objective.streams), None, trained.keyframe_marker)
    return Heldout(dataset, objective, config, world)


def _heldout_lines(trained: "Trained", losses: "HeldoutLosses") -> Iterable[str]:
    """The mean losses of one kind of weights with their intervals, and what is to be said about them."""
    estimates = {modality: losses.mean(modality) for modality in ("video", "audio")}
    shown = (f"{modality} {_figure(found.to_dict(), 4)}" for modality, found in estimates.items() if found.count)
    yield f"step {trained.step}  held-out loss, {trained.weights:<3} weights: {'  '.join(shown)}"
    yield from (f"  {modality}: {found.note}" for modality, found in estimates.items() if found.note)


def _sample(
    config: "SamplesConfig", trained: "Trained", dataset: "LatentDataset", world: "World", directory: Path
) -> Iterable[str]:
    from ltx2_train.distributed.world import agreed
    from ltx2_train.evals.samples import Samples, Sampling

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
    summary = samples.run(trained.model, directory, step=trained.step, weights=trained.weights, origin=origin)
    seconds, made = time.perf_counter() - begin, summary["count"] - samples.taken_up
    if samples.taken_up:
        yield f"step {trained.step}  {samples.taken_up} clips taken up from an evaluation that was broken off"
    yield f"step {trained.step}  {made} clips sampled, decoded and measured in {seconds:.1f} s: {directory}"
    for name, figures in (summary["sync"] or {}).items():
        yield _sync_line(name, figures)
    yield from metrics_table(summary["metrics"])


def _sync_line(name: str, figures: dict[str, Any]) -> str:
    chance = "" if figures["chance"] is None else f"chance {figures['chance']:.3f}, "
    return (
        f"  {name:<8} onset F1 at ±{figures['tolerance_ms']:.0f} ms: {_figure({'value': figures['f1'], **figures}, 3)}  "
        f"({chance}{figures['impacts']} impacts seen, "
        f"{figures['onsets']} onsets heard, {figures['matched']} matched, {figures['clips']} clips)"
    )


def metrics_table(metrics: dict[str, dict[str, Any]]) -> Iterable[str]:
    """A line per metric: sampled, real, unit, clips, and what is to be said about the figure."""
    rows = [("", "sampled", "real", "unit", "clips", "")]
    for name, found in metrics.items():
        sampled = found["sampled"]
        real = _figure(found["real"], 3) if "real" in found else ""
        rows.append((name, _figure(sampled, 3), real, found["unit"], str(sampled["count"]), sampled["note"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows if metrics else []:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()


def _figure(estimate: dict[str, Any], digits: int) -> str:
    """An estimate's value and interval; a dash where there is none."""
    return "–" if estimate["value"] is None else _interval(estimate["value"], estimate, digits)


def _interval(value: float, bounds: dict[str, Any], digits: int = 3) -> str:
    if bounds["low"] is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{bounds['low']:.{digits}f}, {bounds['high']:.{digits}f}]"


if __name__ == "__main__":
    sys.exit(main())
