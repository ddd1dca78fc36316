"""What `ltx2-train` is told: the dataclasses of the library composed into one, and the way from YAML to it and back."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ltx2_train.cli.components import ComponentsConfig
from ltx2_train.cli.entry import unknown_setting
from ltx2_train.data.loader import LoaderConfig
from ltx2_train.data.plan import PlanConfig
from ltx2_train.data.shards import StoreConfig
from ltx2_train.diffusion.objective import ObjectiveConfig
from ltx2_train.distributed.engine import EngineConfig
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.evals.heldout import HeldoutConfig
from ltx2_train.evals.samples import SamplesConfig
from ltx2_train.model.build import ModelConfig
from ltx2_train.model.lora import LoraConfig
from ltx2_train.model.modality import Stream
from ltx2_train.train.ema import EmaConfig
from ltx2_train.train.optim import OptimConfig
from ltx2_train.train.sinks import SinksConfig
from ltx2_train.train.trainer import TrainConfig

SCHEMA_NAME = "train_job"
CONFIG_NAME = "config.yaml"
_HEADER = """\
# The whole configuration of this run, as it was resolved. The run goes on, or starts again elsewhere, with
#   ltx2-train --config-dir {run_dir} --config-name config
"""
_DEFAULTS = {"defaults": [SCHEMA_NAME, "program", "_self_", {"override hydra/job_logging": "stdout"}]}

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """One latent dataset of the mixture."""

    path: str
    """Directory or URL that data_prep.encode wrote."""
    weight: float | None = None
    """Share of the samples that come from here, relative to the other datasets. null for all: by their sizes."""

    def __post_init__(self) -> None:
        if self.weight is not None and not self.weight > 0:
            raise ConfigError(f"data.datasets: weight={self.weight} of {self.path}: must be above 0")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is trained on, and in which order."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)
    """Keys of samples that are left out from this start on; the run remembers them. The plan is made anew without them, so
    in the epoch under way some samples may come twice and some not at all."""
    store: StoreConfig = field(default_factory=StoreConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    @property
    def weights(self) -> list[float] | None:
        """The shares of the mixture, or None: by size."""
        weights = [dataset.weight for dataset in self.datasets]
        given = [weight for weight in weights if weight is not None]
        return given or None

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ConfigError(
                "data.datasets is empty: give data.datasets.0.path=DIRECTORY, as data_prep.encode wrote it"
            )
        if len({dataset.weight is None for dataset in self.datasets}) > 1:
            raise ConfigError("data.datasets: give every dataset a weight, or none of them")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """What is looked at every train.eval_every steps."""

    datasets: list[str] = field(default_factory=list)
    """Held-out latent datasets. Empty: nothing is evaluated."""
    heldout: HeldoutConfig | None = field(default_factory=HeldoutConfig)
    """Loss on fixed clips, noise and sigmas. null: not measured."""
    samples: SamplesConfig | None = field(default_factory=SamplesConfig)
    """Clips sampled from held-out captions. null: none are."""
    profile: str = "demo"
    """Sampler profile, by name or a .yaml file of your own; it is stored with every checkpoint, and ltx2-sample uses it."""


@dataclass(kw_only=True, slots=True)
class TrainJob:
    """One training run."""

    seed: int = 0
    """Key of the initial weights, noise, sigmas and conditioning. conf/ ties data.plan.seed to it."""
    train: TrainConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    data: DataConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig | None = field(default_factory=EmaConfig)
    sinks: SinksConfig = field(default_factory=SinksConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    components: ComponentsConfig = field(default_factory=ComponentsConfig)

    @property
    def sampled_streams(self) -> frozenset[Stream]:
        """What the model makes: all that it is built with where it began with weights, else what it is trained on.

        A stream that no one trained makes noise, and what it sends to the other is noise.
        """
        return frozenset(self.objective.streams if self.model.weights is None else self.model.streams)


def register() -> None:
    """Makes the schema known to Hydra. May be called again."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA_NAME, node=TrainJob)


def to_config(cfg: Any, schema: type[T]) -> T:
    """The dataclass of a composed configuration: the last that is seen of the configuration library.

    Raises `ConfigError` on a value out of its bound or a setting that was added, and the library's own errors on a
    missing or mistyped one.
    """
    from omegaconf import OmegaConf

    if added := list(_added(cfg)):
        raise ConfigError(unknown_setting(added[0], schema))
    try:
        job = OmegaConf.to_object(cfg)
    except ConfigError as error:
        raise ConfigError(_located(cfg, str(error))) from error
    assert isinstance(job, schema), f"{type(job)} came out of a configuration for {schema}"
    return job


def _added(node: Any, prefix: str = "") -> Iterator[str]:
    """Settings that no dataclass has; Hydra lets them in when they are written with a +."""
    from omegaconf import DictConfig, ListConfig, OmegaConf

    if isinstance(node, ListConfig) or not isinstance(node, DictConfig) or node._is_none():
        return
    owner = OmegaConf.get_type(node)
    known = {f.name for f in fields(owner)} if is_dataclass(owner) else set(node)
    for name in map(str, node):
        if name not in known:
            yield f"{prefix}{name}"
        elif not OmegaConf.is_missing(node, name) and not OmegaConf.is_interpolation(node, name):
            yield from _added(node[name], f"{prefix}{name}.")


def _located(cfg: Any, message: str) -> str:
    """The message of a section's check, with the section's name where it does not say it."""
    from omegaconf import OmegaConf

    for section in cfg:
        try:
            if OmegaConf.is_config(cfg[section]):
                OmegaConf.to_object(cfg[section])
        except ConfigError:
            return message if f"{section}." in message else f"{section}: {message}"
    return message


def plain(value: Any) -> Any:
    """Dataclasses, enums and paths as dicts, names and strings: what JSON and YAML can hold."""
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.name if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


def to_yaml(job: TrainJob) -> str:
    """The text of a run's config.yaml: every setting, resolved, and the defaults that let Hydra check it again."""
    from omegaconf import OmegaConf

    body = OmegaConf.to_yaml(OmegaConf.create({**_DEFAULTS, **plain(job)}))
    return _HEADER.format(run_dir=job.train.run_dir) + body


def save_job(job: TrainJob, run_dir: Path) -> None:
    """Writes run_dir/config.yaml, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / f"{CONFIG_NAME}.partial"
    partial.write_text(to_yaml(job), encoding="utf-8")
    partial.replace(run_dir / CONFIG_NAME)


def load_job(run_dir: Path) -> TrainJob:
    """The job of a run directory. Raises `CheckpointError` when it has none, or one that this version cannot read."""
    path = run_dir / CONFIG_NAME
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing: {run_dir} is no run directory. Give the directory that ltx2-train wrote"
        )
    return job_from_text(path.read_text(encoding="utf-8"), str(path))


def job_from_text(text: str, source: str) -> TrainJob:
    """The job that `to_yaml` wrote down."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(OmegaConf.create(text))
        assert isinstance(values, dict)
        del values["defaults"]
        return to_config(OmegaConf.merge(OmegaConf.structured(TrainJob), values), TrainJob)
    except (OmegaConfBaseException, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: not a configuration of this version ({reason}). Start a new run") from error
