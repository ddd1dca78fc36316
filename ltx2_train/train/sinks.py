"""Where records go: the console, a file of JSON lines, Weights & Biases. A sink has `log(record)` and `close()`.

None of them can end a run. JSON lines that cannot be written wait in memory until there is room again, and every record
says so on the console; any other sink that fails is closed, with one warning.
"""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.json"
TRAINED_STEP = "trained_step"  # axis of the figures of evaluations beside a run


class WandbMode(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class Sink(Protocol):
    def log(self, record: dict[str, Any]) -> None:
        """Takes one record: numbers of a step, or an event (`record["event"]`)."""

    def close(self) -> None:
        """Writes out what is left."""


@dataclass(kw_only=True, slots=True)
class SinksConfig:
    """Where the run's numbers go. The JSON lines in run_dir/metrics.jsonl are always written."""

    console: bool = True
    """Progress bar on a terminal, one line per record elsewhere."""
    wandb: bool = True
    """Also a Weights & Biases run under run_dir/wandb."""
    wandb_mode: WandbMode = WandbMode.offline
    """offline (nothing leaves the machine; `wandb sync` uploads later), online or disabled."""
    wandb_project: str = "ltx2_train"
    """Project that the run belongs to there."""
    wandb_name: str | None = None
    """Name of the run there. None: the run directory's name."""

    def __post_init__(self) -> None:
        self.wandb_mode = WandbMode(self.wandb_mode)


def open_sinks(
    config: SinksConfig, run_dir: Path, *, step: int, max_steps: int, settings: dict[str, Any], is_main: bool = True
) -> list[Sink]:
    """The sinks of this process: all that are asked for on the main rank, none elsewhere.

    `step` is where the run goes on; what an earlier attempt logged after it is cut away. Raises what opening one raises:
    from here on they are tolerant.
    """
    if not is_main:
        return []
    sinks: list[Sink] = [JsonlSink(run_dir / METRICS_NAME, step=step)]
    if config.wandb and config.wandb_mode is not WandbMode.disabled:
        sinks.append(WandbSink(config, run_dir, settings))
    if config.console:
        sinks.append(ConsoleSink(step=step, max_steps=max_steps))
    return [Tolerant(sink) for sink in sinks]


class Tolerant:
    """A sink whose failure is told once and costs its further records, not the run."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self._works = sink, True

    def log(self, record: dict[str, Any]) -> None:
        self._try("takes no record", lambda: self.sink.log(record))

    def close(self) -> None:
        self._try("cannot be closed", self.sink.close)

    def _try(self, what: str, task: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            task()
        except Exception:
            self._works = False
            logger.warning("%s %s; the run goes on without it", type(self.sink).__name__, what, exc_info=True)


def open_evaluation_sinks(
    config: SinksConfig, run_dir: Path, path: Path, *, settings: dict[str, Any], is_main: bool = True
) -> list[Sink]:
    """For evaluations beside a run: the JSON lines in `path`, and a Weights & Biases run grouped with the run's own.

    Two processes cannot write one run there, so it is another one, with the steps of the trained run as its own axis.
    """
    if not is_main:
        return []
    sinks: list[Sink] = [JsonlSink(path, step=sys.maxsize)]
    if config.wandb and config.wandb_mode is not WandbMode.disabled:
        sinks.append(WandbSink(config, run_dir, settings, beside=True))
    return sinks


class JsonlSink:
    """One JSON object per line, written at once, so that a killed run leaves all it had said."""

    def __init__(self, path: Path, *, step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            keep_until(path, step)
        self.path, self.file = path, path.open("ab", buffering=0)
        self._waiting = bytearray()

    def log(self, record: dict[str, Any]) -> None:
        line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        self._waiting += line.encode()
        self._write()

    def close(self) -> None:
        self._write()
        self.file.close()

    def _write(self) -> None:
        """Writes what waits, in order: a part that a full disk still took is not written twice."""
        try:
            while self._waiting:
                del self._waiting[: self.file.write(self._waiting)]
        except OSError as error:
            logger.error("%s CANNOT BE WRITTEN: %s. %d bytes wait for it", self.path, error, len(self._waiting))


def keep_until(path: Path, step: int) -> None:
    """Cuts a metrics file back to `step`: later lines and a half-written last line go, so that no curve runs twice.

    At step 0 nothing stays: the run starts anew, its first evaluation included.
    """
    kept = [line for line in _lines(path) if step and _step_of(line) <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(line + b"\n" for line in kept))
    partial.replace(path)


def recorded_events(path: Path, step: int) -> set[str]:
    """Names of the events of a step in a metrics file; none of step 0, where a run starts anew."""
    lines = _lines(path) if step and path.exists() else []
    return {record["event"] for record in (json.loads(x) for x in lines if _step_of(x) == step) if "event" in record}


def _lines(path: Path) -> list[bytes]:
    """Bytes, because a kill can tear a character, and because text has more line ends than the one that is written."""
    return path.read_bytes().split(b"\n")


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by a kill: not a record


class ConsoleSink:
    """A tqdm bar on a terminal; one log line per record where the output is a file or a pipe."""

    def __init__(self, *, step: int, max_steps: int, stream: Any = None):
        self.max_steps = max_steps
        stream = stream or sys.stderr
        self.bar = None
        if stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=max_steps, initial=step, unit="step", file=stream, dynamic_ncols=True)

    def log(self, record: dict[str, Any]) -> None:
        if "event" in record:
            self._say(event_line(record))
        elif self.bar is None:
            self._say(f"step {record['step']}/{self.max_steps}  {progress_line(record)}")
        else:
            self.bar.update(record["step"] - self.bar.n)
            self.bar.set_postfix_str(progress_line(record))

    def _say(self, line: str) -> None:
        if self.bar is None:
            logger.info(line)
        else:
            self.bar.write(line, file=self.bar.fp)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def progress_line(record: dict[str, Any]) -> str:
    """Loss per modality, speed, step time and data wait, for the eye."""
    losses = (("video", record["loss_video"]), ("audio", record["loss_audio"]))
    parts = [f"{name} {loss:.4f}" for name, loss in losses if loss is not None]
    parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    parts.append(f"step {record['step_seconds']:.2f} s, data {record['data_seconds']:.2f} s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.0%}")
    return "  ".join(parts)


def event_line(record: dict[str, Any]) -> str:
    """An event in one line: its name, its step and its plain values."""
    values = [f"{k} {_short(v)}" for k, v in record.items() if k not in ("event", "step", "time") and _is_plain(v)]
    return f"step {record['step']}  {record['event']}: " + ", ".join(values)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and value is not None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class WandbSink:
    """A Weights & Biases run. Its id is kept under run_dir, so that a resumed run goes on with the same curves.

    Figures of a step stand under their own names, those of an event under the event's; losses by sigma under
    `loss_by_sigma/MODALITY/LOW-HIGH`. Events that name a directory with samples bring their films and the contact sheet.
    `beside`: for evaluations outside the run's own process, in a run of their own in one group with it.
    """

    def __init__(self, config: SinksConfig, run_dir: Path, settings: dict[str, Any], *, beside: bool = False):
        import wandb

        self.step, self.beside = 0, beside
        run_id, name = _run_id(run_dir), config.wandb_name or run_dir.name
        self.run = wandb.init(
            project=config.wandb_project,
            name=f"{name} evaluations" if beside else name,
            id=f"{run_id}-evals" if beside else run_id,
            group=run_id,
            job_type="evaluation" if beside else "training",
            # Offline, an earlier run cannot be asked for; `wandb sync --append` joins runs of one id.
            resume="allow" if config.wandb_mode is WandbMode.online else None,
            mode=config.wandb_mode.value,
            dir=str(run_dir),
            config=settings,
            settings=wandb.Settings(silent=True),
        )
        if beside:  # checkpoints may be evaluated in any order, and steps there only grow
            self.run.define_metric("*", step_metric=TRAINED_STEP)

    def log(self, record: dict[str, Any]) -> None:
        prefix = f"{record['event']}/" if "event" in record else ""
        values = {k: v for k, v in record.items() if k not in ("event", "step", "sigma_bins")}
        values |= {"loss_by_sigma": named_bins(record["sigma_bins"])} if "sigma_bins" in record else {}
        named: dict[str, Any] = {prefix + k: v for k, v in numbers(values)}
        if "event" in record and "directory" in record:
            named |= {prefix + name: one for name, one in _media(Path(record["directory"])).items()}
        if self.beside:
            self.run.log(named | {TRAINED_STEP: record["step"]})
            return
        self.step = max(self.step, record["step"])  # an event may tell of an earlier step; steps there only grow
        self.run.log(named, step=self.step)

    def close(self) -> None:
        self.run.finish()


def named_bins(bins: dict[str, list[list[float | None]]]) -> dict[str, dict[str, float | None]]:
    """The mean losses of (count, mean) pairs by modality, under the bounds of their bins of sigma."""
    return {
        modality: {f"{i / len(pairs):.1f}-{(i + 1) / len(pairs):.1f}": mean for i, (_, mean) in enumerate(pairs)}
        for modality, pairs in bins.items()
    }


def _media(directory: Path) -> dict[str, Any]:
    """Films of the shown clips by their number, and the contact sheet, as samples.json in the directory names them."""
    import wandb

    found = json.loads((directory / SAMPLES_NAME).read_text())
    shown = [clip for clip in found["clips"] if clip["sampled"].get("media")]
    media: dict[str, Any] = {
        f"film/{i}": wandb.Video(str(directory / clip["sampled"]["media"]), caption=clip["caption"], format="mp4")
        for i, clip in enumerate(shown)
    }
    if found.get("sheet"):
        media["sheet"] = wandb.Image(str(directory / found["sheet"]))
    return media


def _run_id(run_dir: Path) -> str:
    """The id of this run directory's run, made at the first call."""
    path = run_dir / "wandb" / "run_id"
    if not path.exists():
        import uuid

        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def numbers(values: Any, prefix: str = "") -> Iterable[tuple[str, float]]:
    """The finite numbers inside nested dicts and lists, with slashed names."""
    if isinstance(values, bool | int | float):
        if math.isfinite(values):
            yield prefix, values
    elif isinstance(values, dict | list | tuple):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in items:
            yield from numbers(value, f"{prefix}/{name}" if prefix else str(name))


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
