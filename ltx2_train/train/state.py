"""What a run remembers between steps, and how it is told whether a checkpoint belongs to it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.train.faults import BadUpdate

Changes = dict[str, tuple[Any, Any]]  # setting -> its value in a checkpoint and now

# Settings that do not change what is computed, or that stand for something else. All others define the run.
FREE_SETTINGS = (
    "train.*",  # how often, where to and how long; the seed stands outside
    "sinks.*",
    "evaluation.*",
    "components.*",  # the data know them by their content
    "data.loader.*",
    "data.store.*",
    "data.datasets.*.path",  # a dataset is known by its content
    "data.skip*",  # carried on by the state
    "data.plan.split",
    "engine.backend",  # how the model is spread out: the same course, up to the order of sums
    "engine.replicate",
    "engine.sequence",
    "engine.reshard",
    "engine.prefetch",
    "engine.offload",
    "engine.recompute*",
    "engine.compile",
)
COURSE_SETTINGS = ("train.faults.skips", "train.faults.loss_*")  # of the free ones those that define the run after all


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything that is not a function of (config, seed, step). `step`: optimizer updates done."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    bad_records: int = 0
    """Damaged records among `samples`."""
    seconds: float = 0.0
    """Training time so far, over all resumptions."""
    skipped: tuple[str, ...] = ()
    """Keys of samples that a rollback took out of the run: an input of the plan."""
    rollbacks: int = 0
    """Rollbacks so far."""
    bad: tuple[BadUpdate, ...] = ()
    """The bad updates since the last one that was applied."""
    losses: tuple[float, ...] = ()
    """Losses of the last applied updates, where a bound on the loss follows from them."""

    def to_dict(self) -> dict[str, Any]:
        bad = [update.to_dict() for update in self.bad]
        return asdict(self) | {"skipped": list(self.skipped), "bad": bad, "losses": list(self.losses)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainState":
        bad = tuple(BadUpdate.from_dict(update) for update in values.get("bad", ()))
        lists = {name: tuple(values.get(name, ())) for name in ("skipped", "losses")}
        return cls(**{**values, **lists, "bad": bad})

    def applied(self, loss: float, window: int) -> "TrainState":
        """The state after an update that was applied. `window`: losses that are remembered."""
        losses = (*self.losses, loss)[-window:] if window else ()
        return replace(self, step=self.step + 1, bad=(), losses=losses)

    def refused(self, update: BadUpdate) -> "TrainState":
        """The state after an update that was not applied: its step has gone by."""
        return replace(self, step=self.step + 1, bad=(*self.bad, update))

    def without(self, keys: Iterable[str]) -> "TrainState":
        """The state, these samples left out from here on."""
        return replace(self, skipped=tuple(sorted({*self.skipped, *keys})))

    def rolled_back(self, keys: Iterable[str]) -> "TrainState":
        """The state of a checkpoint that a run has gone back to, without these samples from here on."""
        return replace(self.without(keys), rollbacks=self.rollbacks + 1, bad=())

    def after(
        self, *, steps: int = 0, samples: int = 0, tokens: int = 0, bad_records: int = 0, seconds: float = 0.0
    ) -> "TrainState":
        """The state with this much more done."""
        return replace(
            self,
            step=self.step + steps,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            bad_records=self.bad_records + bad_records,
            seconds=self.seconds + seconds,
        )


def defining_settings(config: Mapping[str, Any], free: tuple[str, ...] = FREE_SETTINGS) -> dict[str, Any]:
    """The settings that define the run, flat: dotted name -> plain value."""
    flat = _flatten(config)
    return {name: v for name, v in flat.items() if _matches(name, COURSE_SETTINGS) or not _matches(name, free)}


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], source: str, change: Sequence[str] = ()
) -> Changes:
    """In which settings a checkpoint's run differs from this one, where `change` has a pattern for each of them.

    Raises `CheckpointError` listing all others that differ, `ConfigError` for a pattern of no defining setting at all.
    """
    names = sorted(saved.keys() | current.keys())
    for pattern in change:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"train.change={list(change)}: {pattern} is no setting that defines a run")
    both = {name: (saved.get(name, "(not set)"), current.get(name, "(not set)")) for name in names}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    refused = [name for name in differing if not _matches(name, change)]
    if refused:
        lines = [f"  {name}: {both[name][0]} in the checkpoint, {both[name][1]} now" for name in refused]
        raise CheckpointError(
            f"{source} belongs to another run:\n" + "\n".join(lines) + "\nRestore these settings to go on with it, "
            f"change them on purpose with train.change=[{','.join(refused)}], or start anew with another train.run_dir"
        )
    return differing


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(name), v) for name, v in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    if not items:
        return {prefix: "[]"} if prefix else {}
    return {k: v for name, inner in items for k, v in _flatten(inner, f"{prefix}.{name}" if prefix else name).items()}
