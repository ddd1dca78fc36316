"""`ltx2-plan`: what a plan makes of datasets, before a GPU is paid for. Reads indexes, never the samples."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ltx2_train.cli.entry import EXIT_ERROR
from ltx2_train.errors import ConfigError, Ltx2Error

if TYPE_CHECKING:
    from ltx2_train.data.datasets import LatentDataset
    from ltx2_train.data.plan import Plan, PlanConfig, PlannedStep

SHOWN_WORLD_SIZES = 24
DESCRIPTION = """\
Show how datasets are cut into micro-batches and steps: buckets, tokens, steps per epoch, how full the token budget
is, how alike the micro-batches of a step are, and on how many processes the same run can be trained.

A dataset is a directory of latent shards that data_prep.encode wrote, or a URL (s3://...). Several are mixed.
A step is made of --micro-batches micro-batches over ALL processes; the plan, and with it the run, is the same on any
number of processes that is printed as valid. Nothing is trained and no sample is read."""
EPILOG = """\
examples:
  ltx2-plan data/latents                                      what one micro-batch per step looks like
  ltx2-plan data/latents --micro-batches 8 --world 8          the same for eight GPUs
  ltx2-plan data/latents --max-tokens 32768 --max-samples 64  a larger token budget
  ltx2-plan clips images --weights 0.8 0.2                    a mixture: 80 % of the samples are clips
  ltx2-plan --rebuild-index data/latents                      read the tar headers again
  ltx2-plan --verify data/latents                             read every byte and hold it against the manifest"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-plan", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("datasets", nargs="+", metavar="DATASET", help="directory of latent shards, or fsspec URL")
    p.add_argument("--weights", nargs="+", type=float, metavar="W", help="share of the samples from each dataset")
    p.add_argument("--micro-batches", type=int, metavar="N", help="micro-batches per step over all processes (1)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="latent tokens of a micro-batch, at most (16384)")
    p.add_argument("--max-samples", type=int, metavar="N", help="samples of a micro-batch, at most (16)")
    p.add_argument("--block-shards", type=int, metavar="N", help="shards that are shuffled together (16)")
    p.add_argument("--split", type=int, metavar="K", help="parts that a micro-batch is cut into (as few as needed)")
    p.add_argument("--seed", type=int, metavar="N", help="key of the shuffling (0)")
    p.add_argument("--world", type=int, metavar="N", help="check this number of processes")
    p.add_argument("--steps", type=int, metavar="N", help="steps to measure (an epoch, at most 1000)")
    p.add_argument("--rebuild-index", action="store_true", help="read the tar headers again; local datasets only")
    p.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read tar headers (0: this one)")
    p.add_argument("--verify", action="store_true", help="hold the SHA-256 of every shard against the manifest")
    p.add_argument("--cache", metavar="DIR", help="local directory for copies of remote files")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that names the next action."""
    args = parser().parse_args(argv)
    try:
        for line in report(args):
            print(line)
    except Ltx2Error as error:
        print(f"ltx2-plan: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def report(args: argparse.Namespace) -> Iterable[str]:
    """The lines to print."""
    from ltx2_train.data.datasets import check_mixture
    from ltx2_train.data.plan import Plan

    if args.steps is not None and args.steps < 1:
        raise ConfigError(f"--steps {args.steps}; must be >= 1")
    config = _config(args)
    datasets = _open(args)
    check_mixture(datasets)
    for dataset in datasets:
        yield from _describe(dataset)
    plan = Plan([dataset.index for dataset in datasets], args.weights, config)
    yield from _buckets(plan)
    yield from _epoch(plan, args.steps)
    yield from _worlds(plan, args.world)


def _config(args: argparse.Namespace) -> "PlanConfig":
    from ltx2_train.data.plan import PlanConfig

    names = ("max_tokens", "max_samples", "block_shards", "split", "seed")
    given = {name: getattr(args, name) for name in names} | {"micro_batches_per_step": args.micro_batches}
    return PlanConfig(**{name: value for name, value in given.items() if value is not None})


def _open(args: argparse.Namespace) -> "list[LatentDataset]":
    from ltx2_train.data.datasets import open_dataset
    from ltx2_train.data.index import build_index
    from ltx2_train.data.shards import StoreConfig, as_local, is_remote

    for location in args.datasets if args.rebuild_index else ():
        if is_remote(as_local(location)):
            raise ConfigError(f"--rebuild-index {location}: rebuild it where the shards are local, then copy it there")
        build_index(Path(as_local(location)), args.workers)
    store = StoreConfig(cache=args.cache, verify=args.verify)
    return [open_dataset(location, store) for location in args.datasets]


def _describe(dataset: "LatentDataset") -> Iterable[str]:
    m, index = dataset.manifest, dataset.index
    size = float(index.shard_sizes.sum()) / 1e9
    yield f"{dataset.location}: {len(index):,} samples in {len(index.shard_names):,} shards, {size:.3g} GB"
    widths = f"{m.video_text_width}+{m.audio_text_width}"
    yield f"  codecs {m.video_codec} and {m.audio_codec}, text {m.text_encoder} ({widths} wide)"
    yield f"  text rows: mean {index.text_lengths.mean():.1f}, longest {index.text_lengths.max()}"


def _buckets(plan: "Plan") -> Iterable[str]:
    shares = plan.shares()
    total = sum(share.samples for share in shares)
    yield ""
    yield "buckets (latent frames x height x width + audio steps), in one epoch"
    columns = ("bucket", "has", "samples", "share", "tokens", "per micro-batch", "budget used", "micro-batches")
    yield _row(columns)
    for share in sorted(shares, key=lambda s: -s.samples):
        bucket, size = share.bucket, share.micro_batch_samples
        used = bucket.tokens * size / plan.config.max_tokens
        cells = (
            f"{share.samples:,.0f}",
            f"{share.samples / total:.1%}",
            f"{bucket.tokens:,}",
            str(size),
            f"{used:.0%}",
        )
        yield _row((str(bucket), bucket.signature, *cells, f"{share.micro_batches:,.1f}"))
    for share in shares:
        if share.micro_batches < 1:
            epochs = -(-share.micro_batch_samples // max(share.samples, 1e-9))
            yield f"  {share.bucket} fills a micro-batch only every {epochs:.0f} epochs; a smaller --max-samples helps"


def _row(cells: Sequence[str]) -> str:
    return f"  {cells[0]:>16} {cells[1]:>4} " + " ".join(
        f"{cell:>{w}}" for cell, w in zip(cells[2:], WIDTHS, strict=True)
    )


WIDTHS = (12, 7, 9, 16, 12, 14)


def _epoch(plan: "Plan", num_steps: int | None) -> Iterable[str]:
    per_epoch = plan.steps_before_epoch(1)
    steps = [plan.step(n) for n in range(num_steps or min(max(per_epoch, 1), 1000))]
    size, num = plan.config.micro_batches_per_step, len(steps)
    samples, tokens = sum(s.num_samples for s in steps), sum(s.tokens for s in steps)
    spreads = sorted(_spread(step) for step in steps)
    mixed = sum(len({m.bucket.signature for m in step.micro_batches}) > 1 for step in steps)
    epoch_samples = sum(share.samples for share in plan.shares())
    epoch_tokens = sum(share.bucket.tokens * share.samples for share in plan.shares())
    yield ""
    yield f"one epoch: {epoch_samples:,.0f} samples, {epoch_tokens:,.0f} tokens, {per_epoch:,} steps"
    yield f"measured over the first {num:,} steps of {size} micro-batches:"
    yield f"  samples per step     mean {samples / num:,.1f}"
    yield f"  tokens per step      mean {tokens / num:,.0f}, all of them data: latents are never padded"
    yield f"  occupancy            {tokens / (num * size * plan.config.max_tokens):.1%} of the token budget"
    yield f"  memory-cost spread   median {spreads[num // 2]:.2f}, worst {spreads[-1]:.2f} (largest / smallest)"
    yield f"  mixed signatures     {mixed / num:.1%} of the steps hold micro-batches with different modalities"


def _spread(step: "PlannedStep") -> float:
    tokens = [m.tokens for m in step.micro_batches]
    return max(tokens) / min(tokens)


def _worlds(plan: "Plan", world: int | None) -> Iterable[str]:
    valid = plan.valid_data_sizes()
    more = f", ... {valid[-1]}" if len(valid) > SHOWN_WORLD_SIZES else ""
    yield ""
    listed = ", ".join(map(str, valid[:SHOWN_WORLD_SIZES])) or "none"
    yield f"valid numbers of data ranks (processes / engine.sequence): {listed}{more}"
    if world is not None:
        parts = plan.split(world)
        passes = plan.config.micro_batches_per_step * parts // world
        cut = f", each planned one cut into {parts} parts" if parts > 1 else ""
        yield f"on {world} processes: {passes} micro-batches per process and step{cut}"


if __name__ == "__main__":
    sys.exit(main())
