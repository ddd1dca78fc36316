"""What a run remembers between steps, and how it is told whether a checkpoint belongs to it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ltx2_train.errors import CheckpointError
from ltx2_train.train.faults import BadUpdate

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything that is not a function of (config, seed, step). `step`: optimizer updates done."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
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

    def rolled_back(self, keys: Iterable[str]) -> "TrainState":
        """The state of a checkpoint that a run has gone back to, without these samples from here on."""
        return replace(self, skipped=tuple(sorted({*self.skipped, *keys})), rollbacks=self.rollbacks + 1, bad=())

    def after(self, *, steps: int = 0, samples: int = 0, tokens: int = 0, seconds: float = 0.0) -> "TrainState":
        """The state with this much more done."""
        return replace(
            self,
            step=self.step + steps,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            seconds=self.seconds + seconds,
        )


def defining_settings(config: Mapping[str, Any], free: tuple[str, ...] = FREE_SETTINGS) -> dict[str, Any]:
    """The settings that define the run, flat: dotted name -> plain value."""
    flat = _flatten(config)
    return {name: v for name, v in flat.items() if not any(fnmatchcase(name, pattern) for pattern in free)}


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
    """Raises `CheckpointError` listing every setting that differs between a checkpoint's run and this one."""
    names = sorted(saved.keys() | current.keys())
    missing = "(not set)"
    lines = [
        f"  {name}: {saved.get(name, missing)} in the checkpoint, {current.get(name, missing)} now"
        for name in names
        if saved.get(name, missing) != current.get(name, missing)
    ]
    if lines:
        raise CheckpointError(
            f"{source} belongs to another run:\n" + "\n".join(lines) + "\nRestore these settings to go on with it, "
            "or start anew with another train.run_dir (or train.resume=never and an empty one)"
        )


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
