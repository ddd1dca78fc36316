"""`ltx2-evaluate`: what a run has learned, in figures: held-out loss, and clips whose sound should meet their picture."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx2_train.cli.runs import Trained
    from ltx2_train.data.datasets import LatentDataset
    from ltx2_train.distributed.world import World

DESCRIPTION = """\
Measure the newest complete checkpoint of a run on held-out clips.

Held-out loss: fixed clips, noise and noise levels, per modality, for the trained weights and for their moving average,
with a 95 % interval over clips. With --samples also clips sampled from held-out captions with the run's own sampler
profile: mp4 files beside the real clips, and onset F1: how well the sounds fall on the impacts in the picture,
beside chance (the same clips with exchanged sound) and the real clips through the codec (the ceiling).

Everything goes into RUN/evals, where ltx2-report finds it. Under torchrun the clips are shared by all processes;
the held-out losses are the same on any number of them."""
EPILOG = """\
examples:
  ltx2-evaluate outputs/demo/run                            held-out loss
  ltx2-evaluate outputs/demo/run --samples 64 --shown 4     and 64 sampled clips, four of them kept as mp4
  ltx2-evaluate RUN --data OTHER/heldout --profile demo     on another dataset, with another sampler profile"""


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
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled clips (0)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which are sampled (ema)")
    p.add_argument("--profile", metavar="NAME", help="sampler profile (the one stored with the run)")
    p.add_argument("--base", type=Path, metavar="PATH", help="the released weights the run started from (as it says)")
    p.add_argument("--out", type=Path, metavar="DIR", help="where samples go (RUN/evals/samples-STEP)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that names the next action."""
    options = parser().parse_args(argv)
    from ltx2_train.distributed.world import close_world, init_world
    from ltx2_train.errors import Ltx2Error

    world = init_world()
    try:
        for line in evaluate(options, world):
            if world.is_main:
                print(line, flush=True)
    except Ltx2Error as error:
        print(f"ltx2-evaluate: {error}", file=sys.stderr)
        return 2
    finally:
        close_world()
    return 0


def evaluate(options: argparse.Namespace, world: "World") -> Iterable[str]:
    """The lines to print. All ranks walk through them together."""
    from ltx2_train.cli.runs import WEIGHTS, find_checkpoint, load_trained, run_directory

    checkpoint, run_dir = find_checkpoint(options.run), run_directory(options.run)
    for weights in sorted(WEIGHTS, key=lambda name: name == options.weights):  # those to be sampled come last
        common = {"profile_name": options.profile, "base": options.base, "device": world.device}
        trained = load_trained(checkpoint, weights=weights, **common)
        dataset = _dataset(options, trained)
        if trained.weights == weights:  # a run without a moving average has one kind only
            yield _heldout_line(trained, _heldout(options, trained, dataset, world, run_dir))
    if options.samples:
        yield from _sample(options, trained, dataset, world, run_dir)


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


def _heldout(
    options: argparse.Namespace, trained: "Trained", dataset: "LatentDataset", world: "World", run_dir: Path
) -> dict[str, Any]:
    from dataclasses import replace

    from ltx2_train.diffusion.objective import Objective, ObjectiveConfig
    from ltx2_train.evals.heldout import Heldout, HeldoutConfig, heldout_evaluator

    config = trained.job.evaluation.heldout or HeldoutConfig()
    config = replace(config, clips=options.clips) if options.clips else config
    objective = Objective(ObjectiveConfig(streams=trained.job.objective.streams), None, trained.keyframe_marker)
    evaluator = heldout_evaluator(Heldout(dataset, objective, config, world), run_dir, weights=trained.weights)
    return evaluator(trained.model, trained.step)


def _heldout_line(trained: "Trained", event: dict[str, Any]) -> str:
    losses = (f"{m} {event[f'loss_{m}']:.4f}" for m in ("video", "audio") if event[f"loss_{m}"] is not None)
    return f"step {trained.step}  held-out loss, {trained.weights:<3} weights: {'  '.join(losses)}"


def _sample(
    options: argparse.Namespace, trained: "Trained", dataset: "LatentDataset", world: "World", run_dir: Path
) -> Iterable[str]:
    from ltx2_train.evals.samples import Samples, SamplesConfig, Sampling, samples_directory

    names = ("shown", "batch_size", "seed")
    config = SamplesConfig(clips=options.samples, **{name: getattr(options, name) for name in names})
    sampling = Sampling(
        profile=trained.profile,
        negative=dataset.known_null_text("sampling"),
        keyframe_marker=trained.keyframe_marker,
        dtype=trained.dtype,
    )
    directory = options.out or samples_directory(run_dir, trained.step)
    begin = time.perf_counter()
    samples = Samples(dataset, sampling, trained.components.codecs(), config, world)
    summary = samples.run(trained.model, directory, step=trained.step, weights=trained.weights)
    seconds = time.perf_counter() - begin
    yield f"step {trained.step}  {summary['count']} clips sampled, decoded and measured in {seconds:.1f} s: {directory}"
    for name, figures in (summary["sync"] or {}).items():
        yield _sync_line(name, figures)


def _sync_line(name: str, figures: dict[str, Any]) -> str:
    chance = "" if figures["chance"] is None else f"chance {figures['chance']:.3f}, "
    return (
        f"  {name:<8} onset F1 at ±{figures['tolerance_ms']:.0f} ms: {figures['f1']:.3f} "
        f"[{figures['low']:.3f}, {figures['high']:.3f}]  ({chance}{figures['impacts']} impacts seen, "
        f"{figures['onsets']} onsets heard, {figures['matched']} matched, {figures['clips']} clips)"
    )


if __name__ == "__main__":
    sys.exit(main())
