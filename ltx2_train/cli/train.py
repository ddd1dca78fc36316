"""`ltx2-train`: joins data, model, objective, engine and sinks into a run."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ltx2_train.cli.entry import launch, set_up_logging

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ltx2_train.batch import Batch
    from ltx2_train.cli.schema import TrainJob
    from ltx2_train.data.datasets import LatentDataset
    from ltx2_train.diffusion.profiles import Fit
    from ltx2_train.distributed.engine import Engine
    from ltx2_train.distributed.world import World
    from ltx2_train.model.config import TransformerConfig
    from ltx2_train.train.checkpoint import Checkpointer
    from ltx2_train.train.ema import Ema
    from ltx2_train.train.faults import Rollback
    from ltx2_train.train.state import Changes, TrainState
    from ltx2_train.train.trainer import Evaluator, Outcome, Trainer
    from ltx2_train.weightfile import Stored

logger = logging.getLogger(__name__)

T = TypeVar("T")

NOTE_SECONDS = 5.0
HUNG = ".hung"  # in the run directory: the watchdog ended the run, and the next start tells it

HEADER = """\
ltx2-train [GROUP=OPTION ...] [SETTING=VALUE ...]

Trains the audio-video transformer on latent datasets (made by data_prep.encode), from scratch, from released weights,
or a LoRA beside them. Everything goes into one run directory: configuration, metrics, checkpoints, evaluations. The
same command given again goes on from the newest checkpoint. On SIGTERM, SIGINT or SIGUSR1 the step is finished and
saved and the program ends with code 75; an error that a message explains ends it with 2. Updates that are not finite
are not applied; after several in a row the run goes back to a checkpoint and on without their samples (train.faults).
A run that hangs (train.hang_seconds) says where every rank is and ends with 70, for a launcher to start it again.

Examples:
  ltx2-train experiment=demo data.datasets.0.path=outputs/demo/latents/train train.run_dir=outputs/demo/run
  ltx2-train experiment=lora model.weights=ltx-2.3.safetensors data.datasets.0.path=latents/train optim.lr=2e-4
  ltx2-train -m experiment=demo data.datasets.0.path=latents/train optim.lr=1e-4,3e-4 seed=0,1
  NPROC=8 launch/torchrun.sh -m ltx2_train.cli.train experiment=pretrain data.datasets.0.path=s3://bucket/latents"""


def main() -> int:
    """The exit code of the program."""
    return launch("train", HEADER, _schema, run)


def _schema() -> type:
    from ltx2_train.cli.schema import TrainJob

    return TrainJob


def run(job: "TrainJob") -> int:
    """Trains in this process, one of those that torchrun started or the only one."""
    from ltx2_train.distributed.world import close_world, init_world
    from ltx2_train.train.trainer import EXIT_STOPPED, Outcome

    world = init_world()
    try:
        return EXIT_STOPPED if train(job, world) is Outcome.STOPPED else 0
    finally:
        close_world()


def train(job: "TrainJob", world: "World") -> "Outcome":
    """Trains the job to its end or to a signal."""
    from ltx2_train.distributed.watchdog import Watchdog
    from ltx2_train.train.lock import lock_run
    from ltx2_train.train.trainer import Outcome

    set_up_logging(world.is_main)
    world = world.sharing_samples(job.engine.sequence)
    job.train.run_dir = world.broadcast_object(job.train.run_dir)  # its name may hold the time at which a rank started
    hung = Path(job.train.run_dir) / HUNG

    def note() -> None:
        with suppress(OSError):  # whatever stands in the way of the note, the process must end
            hung.touch()

    def leave(code: int) -> None:
        noting = Thread(target=note, daemon=True)
        noting.start()
        noting.join(NOTE_SECONDS)  # it may be the file system that hangs
        os._exit(code)

    with lock_run(hung.parent, world), Watchdog(world, job.train.hang_seconds, leave=leave) as watchdog:
        trainer = build_trainer(job, world, watchdog.at)
        if trainer.finished:
            step, last = trainer.state.step, job.train.max_steps
            logger.info("nothing to do: %s is at step %d of %d", job.train.run_dir, step, last)
        while (outcome := _run_and_close(trainer)) is Outcome.ROLLED_BACK:
            trainer = build_trainer(job, world, watchdog.at, before=trainer)
    logger.info("%s at step %d; everything lies in %s", outcome.value, trainer.state.step, job.train.run_dir)
    return outcome


def _run_and_close(trainer: "Trainer") -> "Outcome":
    try:
        return trainer.run()
    finally:
        for sink in trainer.sinks:
            sink.close()


def build_trainer(
    job: "TrainJob", world: "World", position: "Callable[[str], None]", *, before: "Trainer | None" = None
) -> "Trainer":
    """All parts of a run, put together: the one place that knows them all.

    `position` is told where in a step this rank is. `before`: the trainer of this run that asks for a rollback; its engine
    is used again, everything else is made anew.
    """
    from ltx2_train.cli.components import PATHS, resolved
    from ltx2_train.cli.schema import plain, save_job
    from ltx2_train.data.datasets import PROVENANCE
    from ltx2_train.data.loader import Loader
    from ltx2_train.data.plan import Plan, left_out
    from ltx2_train.diffusion.objective import Objective
    from ltx2_train.diffusion.profiles import profile
    from ltx2_train.distributed.sequence import GroupBatches
    from ltx2_train.distributed.world import agreed, from_main
    from ltx2_train.model.build import transformer_config
    from ltx2_train.train.checkpoint import Checkpointer
    from ltx2_train.train.ema import Ema
    from ltx2_train.train.faults import LeftOut
    from ltx2_train.train.metrics import Metrics
    from ltx2_train.train.optim import learning_rate
    from ltx2_train.train.sinks import METRICS_NAME, open_sinks, recorded_events
    from ltx2_train.train.trainer import Trainer

    run_dir = Path(job.train.run_dir)
    check_streams(job)
    settle_places(job)
    config = agreed(world, lambda: transformer_config(job.model))
    agreed(world, lambda: check_profile(job, config))
    datasets, heldout = agreed(world, lambda: open_datasets(job, config))
    manifest = datasets[0].manifest
    made_with = {name: getattr(manifest, name) for name in PROVENANCE}
    job.components = resolved(job.components, manifest.settings.get(PATHS, {}))
    origin = find_origin(job, world, before)
    known_as = agreed(world, lambda: identity(job, datasets, origin.directory))
    provenance = {**made_with, "base": known_as["model.weights"]}
    settings = plain(job) | {"sampler_profile": profile(job.evaluation.profile).to_dict(), "provenance": provenance}
    marker = config.use_keyframes_abs_pos_embedding
    objective = Objective(job.objective, datasets[0].null_text, marker)
    engine = open_engine(job, world, resumed=origin.directory is not None) if before is None else before.engine
    ema = Ema(engine.shards(), job.ema) if job.ema is not None else None
    checkpoints = Checkpointer(
        run_dir,
        world,
        keep_last=job.train.keep_last,
        keep_every=job.train.keep_every,
        identity=known_as,
        change=job.train.change if before is None else ["*"],  # a rollback stays in the run
        origin=origin.noted,
    )
    state, changes = origin.state(checkpoints, engine, ema)
    state, indexes, given = state.without(job.data.skip), [d.index for d in datasets], frozenset(job.data.skip)
    plan = Plan(indexes, job.data.weights, job.data.plan, frozenset(state.skipped))
    ended = ended_by(run_dir, world)
    evaluated = from_main(world, lambda: recorded_events(run_dir / METRICS_NAME, state.step))
    from_main(world, lambda: save_job(job, run_dir))
    sinks = agreed(
        world,
        lambda: open_sinks(
            job.sinks,
            run_dir,
            step=state.step,
            max_steps=job.train.max_steps,
            settings=settings,
            is_main=world.is_main,
        ),
    )
    return Trainer(
        config=job.train,
        seed=job.seed,
        world=world,
        engine=engine,
        objective=objective,
        batches=GroupBatches(
            Loader(datasets, plan, world.data_rank, world.data_size, state.step, job.data.loader), world
        ),
        learning_rate=lambda step: learning_rate(step, job.optim),
        metrics=Metrics(world, world.device, peak_of(world, job)),
        checkpoints=checkpoints,
        state=state,
        ema=ema,
        sinks=sinks,
        evaluators=evaluators(job, heldout, marker, world, trained_weights(engine, ema)),
        evaluated={(state.step, name) for name in evaluated},
        bad_fraction=job.data.loader.bad_fraction,
        left_out=lambda keys: [LeftOut(*counts) for counts in left_out(indexes, frozenset(keys), given)],
        changes=changes,
        job=settings,
        rolled_back=origin.rollback,
        resumed={"after": ended} if origin.directory and not origin.rollback else None,
        position=position,
        **flops(job, config, engine),
    )


def flops(job: "TrainJob", config: "TransformerConfig", engine: "Engine") -> "dict[str, Callable[[Batch], float]]":
    """What training on a micro-batch costs: `flops` that it needs, `recomputed_flops` that its backward ran again."""
    from ltx2_train.distributed.engine import Recompute
    from ltx2_train.model.build import context_tokens
    from ltx2_train.train.throughput import Load, batch_load, recomputed_flops, training_flops

    rows = context_tokens(job.model)

    def load(batch: "Batch") -> Load:
        return batch_load(batch, rows, job.objective.streams)

    def needed(batch: "Batch") -> float:
        return training_flops(config, load(batch), lora=job.lora, connectors_trained=job.model.train_connectors)

    def again(batch: "Batch") -> float:
        attentions = job.engine.recompute is not Recompute.selective
        return recomputed_flops(config, load(batch), engine.recomputed(), attentions=attentions, lora=job.lora)

    return {"flops": needed, "recomputed_flops": again}


def ended_by(run_dir: Path, world: "World") -> str:
    """What ended the run before this start, as far as it left a note, which is taken away. All ranks call it."""
    from ltx2_train.distributed.world import from_main

    def take() -> bool:
        noted = (run_dir / HUNG).exists()
        (run_dir / HUNG).unlink(missing_ok=True)
        return noted

    return "a hang" if from_main(world, take) else "an end"


def settle_places(job: "TrainJob") -> None:
    """Makes the places of files absolute: what the run records of them holds in any working directory."""
    from ltx2_train.diffusion.profiles import is_file

    if job.model.weights is not None:
        job.model.weights = str(Path(job.model.weights).absolute())
    if job.lora is not None and job.lora.weights is not None:
        job.lora.weights = str(Path(job.lora.weights).absolute())
    if is_file(job.evaluation.profile):
        job.evaluation.profile = str(Path(job.evaluation.profile).absolute())


def base_fingerprint(job: "TrainJob") -> str | None:
    """Of the weights that the run starts from: what they are, wherever they lie. None: from scratch."""
    from ltx2_train.model.weights import fingerprint

    return None if job.model.weights is None else fingerprint(job.model.weights)


def adapters_fingerprint(job: "TrainJob", origin: Path | None) -> str | None:
    """Of the LoRA file that the run starts from; None: of none.

    A run that goes on has its adapters in the checkpoint `origin`: where the file is gone, what is noted there stands.
    """
    from ltx2_train.train.checkpoint import read_manifest
    from ltx2_train.weightfile import open_weights

    if job.lora is None or job.lora.weights is None:
        return None
    noted = None if origin is None else read_manifest(origin)["identity"].get("lora.weights")
    if noted is not None and not Path(job.lora.weights).exists():
        return str(noted)
    return open_weights(job.lora.weights).fingerprint


def check_streams(job: "TrainJob") -> None:
    """Raises `ConfigError` when the objective runs a stream that the model is built without."""
    from ltx2_train.errors import ConfigError

    built, asked = ({str(s.value) for s in streams} for streams in (job.model.streams, job.objective.streams))
    if missing := asked - built:
        raise ConfigError(
            f"objective.streams={sorted(asked)}: the model has no {', '.join(sorted(missing))} stream "
            f"(model.streams={sorted(built)}). Make them agree"
        )


def fit_of(job: "TrainJob", config: "TransformerConfig") -> "Fit":
    """What sampler profiles are held against: of a run from scratch, any generation."""
    from ltx2_train.diffusion.profiles import Fit
    from ltx2_train.model.generation import UNKNOWN, generation_of

    generation = UNKNOWN if job.model.weights is None else generation_of(config)
    return Fit(generation, job.sampled_streams, config.num_layers)


def check_profile(job: "TrainJob", config: "TransformerConfig") -> None:
    """Raises `ConfigError` for a sampler profile that the model cannot be sampled with."""
    from ltx2_train.diffusion.profiles import check_fits, profile
    from ltx2_train.errors import ConfigError

    try:
        check_fits(profile(job.evaluation.profile), fit_of(job, config))
    except ConfigError as error:
        raise ConfigError(f"evaluation.profile: {error}") from error


def open_datasets(job: "TrainJob", config: "TransformerConfig") -> "tuple[list[LatentDataset], list[LatentDataset]]":
    """The datasets to train on and to evaluate on. Raises `DataError` when they do not fit each other or the model."""
    from ltx2_train.cli.provenance import check_belongs
    from ltx2_train.data.datasets import check_compatible, check_mixture, open_dataset
    from ltx2_train.record import TextCache

    training = [open_dataset(dataset.path, job.data.store) for dataset in job.data.datasets]
    heldout = [open_dataset(path, job.data.store) for path in job.evaluation.datasets]
    check_mixture([*training, *heldout])
    check_compatible(
        training[0].location,
        training[0].manifest,
        against=f"the model {job.model.weights or job.model.name}",
        video_text_width=config.video_connector_width,
        audio_text_width=config.audio_connector_width,
        text_cache=TextCache.FEATURES if job.model.with_connectors else TextCache.CONTEXT,
    )
    check_belongs(job.model.weights, training[0].manifest, training[0].location)
    for dataset in (*training, *heldout):
        check_captions(dataset, job)
    return training, heldout


def check_captions(dataset: "LatentDataset", job: "TrainJob") -> None:
    """Raises `DataError` when captions have more text tokens than the model has rows of context."""
    from ltx2_train.errors import DataError
    from ltx2_train.model.build import context_tokens

    bound, lengths = context_tokens(job.model), dataset.index.text_lengths
    too_long = (lengths > bound).nonzero()[0]
    if len(too_long) or (dataset.null_text is not None and len(dataset.null_text.video) > bound):
        longest = int(lengths.argmax())
        raise DataError(
            f"{dataset.location}: {len(too_long)} captions have more than the {bound} text tokens that the model has "
            f"rows for; the longest, of {dataset.index.key(longest)}, has {int(lengths[longest])}. Set model.text_tokens "
            "to a multiple of the connector's registers that holds it, or shorten the captions and encode again"
        )


def open_engine(job: "TrainJob", world: "World", *, resumed: bool = False) -> "Engine":
    """The model, with adapters if there are any, shared out and filled.

    `resumed`: a checkpoint will be loaded into it.
    """
    from ltx2_train.distributed.build import build_engine
    from ltx2_train.distributed.world import agreed

    return build_engine(
        lambda: build(job),
        lambda model: agreed(world, lambda: begun(starting_weights(model, job, resumed=resumed))),
        job.engine,
        world,
    )


def begun(stream: "Iterable[T]") -> "Iterable[T]":
    """The same stream, its first item taken already: what it checks before that has been checked when this returns."""
    rest = iter(stream)
    return chain(list(islice(rest, 1)), rest)


def starting_weights(
    model: "nn.Module", job: "TrainJob", *, resumed: bool = False
) -> "Iterable[tuple[str, Tensor | Stored]]":
    """(name, tensor) of every parameter at step 0: drawn, from the released weights, adapters from a LoRA file.

    `resumed`: the adapters will come from a checkpoint, and the LoRA file is not opened.
    """
    from ltx2_train.model.build import initial_weights
    from ltx2_train.model.lora import start_from_file

    weights = initial_weights(model, job.model, job.seed)
    return weights if job.lora is None or resumed else start_from_file(weights, model, job.lora)


def build(job: "TrainJob") -> "nn.Module":
    """The module whose weights the job trains, without values."""
    from ltx2_train.model.build import build_model

    model = build_model(job.model)
    if job.lora is None:
        return model
    from ltx2_train.model.lora import add_lora

    return add_lora(model, job.lora)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a run goes on from."""

    directory: Path | None  # the checkpoint; None: step 0
    fixed: bool  # this one and no other; else an older one may stand in for a damaged one
    noted: str  # in the checkpoints from here on: what train.resume was when this course began
    rollback: "Rollback | None" = None  # that leads there

    def state(self, checkpoints: "Checkpointer", engine: "Engine", ema: "Ema | None") -> "tuple[TrainState, Changes]":
        """The state that training begins with, and the settings changed there; weights, optimizer and average are loaded.

        Raises `CheckpointError` when they do not fit.
        """
        from ltx2_train.train.state import TrainState

        if self.directory is None and self.fixed:
            return TrainState(), {}
        template = ema.state() if ema is not None else {}
        restored = checkpoints.load(engine, template, self.directory if self.fixed else None)
        if restored is None:
            return TrainState(), {}
        if ema is not None:
            ema.restore(restored.state)
        state = TrainState.from_dict(restored.state["train"])
        state = state if self.rollback is None else state.rolled_back(self.rollback.keys)
        return state, restored.changes


def find_origin(job: "TrainJob", world: "World", before: "Trainer | None") -> Origin:
    """Where the rollback of the trainer before leads, or else what rank 0 finds. Raises what `origin_of` raises."""
    from ltx2_train.distributed.world import from_main

    if before is not None:
        assert before.rollback is not None
        return Origin(before.rollback.directory, True, before.checkpoints.origin, before.rollback)
    return from_main(world, lambda: origin_of(Path(job.train.run_dir), job.train.resume))


def origin_of(run_dir: Path, wish: str) -> Origin:
    """Where train.resume leads. It is obeyed once: checkpoints note it, and the same wish goes on from the newest of them.

    Raises `CheckpointError` when there is none where it says so, `ConfigError` when there should be none.
    """
    from ltx2_train.errors import CheckpointError, ConfigError
    from ltx2_train.train.checkpoint import holds_checkpoints, newest_complete, noted_origin

    newest = newest_complete(run_dir)
    noted = "" if newest is None else noted_origin(newest)
    wished = wish if wish in ("auto", "never") else str(Path(wish).resolve())
    if wished in ("auto", noted):
        if wished == noted:
            logger.info("train.resume=%s: this run began with it and goes on from its newest checkpoint", wish)
        return Origin(newest, False, noted)
    if wished == "never":
        if holds_checkpoints(run_dir):
            raise ConfigError(f"train.resume=never, but {run_dir} holds checkpoints. Name another train.run_dir")
        return Origin(None, True, wished)
    directory = Path(wish) if not (Path(wish) / "checkpoints").is_dir() else newest_complete(Path(wish))
    if directory is None or not directory.is_dir():
        raise CheckpointError(f"train.resume={wish}: no checkpoint there. Name a step-... directory or a run directory")
    return Origin(directory, True, wished)


def identity(job: "TrainJob", datasets: "Sequence[LatentDataset]", origin: Path | None = None) -> dict[str, Any]:
    """The settings that define the run. Weights and datasets are known by their content, wherever they lie.

    `origin`: the checkpoint that it goes on from.
    """
    from ltx2_train.cli.schema import plain
    from ltx2_train.evals.identity import digest
    from ltx2_train.train.optim import Schedule
    from ltx2_train.train.state import defining_settings

    settings = defining_settings(plain(job))
    if job.optim.schedule is Schedule.constant:  # such a run may be made longer
        for name in ("total_steps", "decay_start", "floor"):
            del settings[f"optim.{name}"]
    settings["model.weights"] = base_fingerprint(job)
    if job.lora is not None:
        settings["lora.weights"] = adapters_fingerprint(job, origin)
    for i, dataset in enumerate(datasets):
        settings[f"data.datasets.{i}.shards"] = digest(dataset.manifest.shards)
    return settings


def peak_of(world: "World", job: "TrainJob") -> float | None:
    """The device's bf16 peak, where it is known and where that is what the model computes in."""
    import torch

    from ltx2_train.distributed.engine import Precision
    from ltx2_train.train.throughput import peak_flops

    if world.device.type != "cuda" or job.engine.precision is not Precision.bf16:
        return None
    return peak_flops(torch.cuda.get_device_name(world.device))


def trained_weights(engine: "Engine", ema: "Ema | None") -> "dict[str, Callable[[], AbstractContextManager[None]]]":
    """While the average is in the model: "raw", the block in which the trained weights are. Empty: there is no average.

    Weights and average have changed places then, and changing them again puts each where it belongs.
    """
    return {} if ema is None else {"raw": lambda: engine.swapped(ema.weights())}


def evaluators(
    job: "TrainJob",
    datasets: "Sequence[LatentDataset]",
    marker: bool,
    world: "World",
    others: "Mapping[str, Callable[[], AbstractContextManager[None]]]" = MappingProxyType({}),
) -> "dict[str, Evaluator]":
    """What is run every train.eval_every steps, by event name. Further held-out datasets have folders of their own.

    `others`: further kinds of weights for the held-out loss, as `heldout_evaluator` takes them.
    """
    from ltx2_train.cli.components import Components
    from ltx2_train.distributed.world import agreed
    from ltx2_train.evals.files import dataset_directory, event_name
    from ltx2_train.evals.heldout import Heldout, heldout_evaluator
    from ltx2_train.evals.samples import Samples, samples_evaluator

    settings, weights = job.evaluation, "ema" if job.ema is not None else "raw"
    found: dict[str, Evaluator] = {}
    if settings.samples is not None and datasets:  # all of them were made with the same codecs
        components = Components.of(job.components, datasets[0].manifest, world.device)
        codecs = agreed(world, components.codecs)
    for i, dataset in enumerate(datasets):
        place = dataset_directory(Path(job.train.run_dir), i)
        if settings.heldout is not None:
            measure = Heldout(
                dataset, _plain_objective(job, marker), settings.heldout, world, job.engine.precision.dtype
            )
            found[event_name("heldout", i)] = heldout_evaluator(measure, place, weights=weights, others=others)
        if settings.samples is not None:
            sampling = agreed(world, partial(_sampling, job, dataset, marker))
            samples = agreed(world, partial(Samples, dataset, sampling, codecs, settings.samples, world))
            found[event_name("samples", i)] = samples_evaluator(samples, place, weights=weights)
    return found


def _plain_objective(job: "TrainJob", marker: bool) -> Any:
    """Generation from text of the streams that are trained: nothing given, no caption dropped."""
    from ltx2_train.diffusion.objective import Objective, ObjectiveConfig

    return Objective(ObjectiveConfig(streams=list(job.objective.streams)), None, marker)


def _sampling(job: "TrainJob", dataset: "LatentDataset", marker: bool) -> Any:
    from ltx2_train.diffusion.profiles import profile
    from ltx2_train.evals.samples import Sampling

    return Sampling(
        profile=profile(job.evaluation.profile),
        negative=dataset.known_null_text("sampling"),
        streams=job.sampled_streams,
        keyframe_marker=marker,
        dtype=job.engine.precision.dtype,
    )


if __name__ == "__main__":
    sys.exit(main())
