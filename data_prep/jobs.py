"""Work that is killed and continued without loss: one job per output shard, and a report for each that is finished.

A job writes its shards atomically and then its report, so a report means that the shards are whole. A rerun does what
has no report, and what has one for another input. A directory belongs to one set of settings and one input; others are
refused, so that no finished work is lost unasked.
"""

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.tars import write_json
from ltx2_train.errors import ConfigError, DataError, Ltx2Error
from ltx2_train.media.write import PARTIAL

log = logging.getLogger(__name__)

REPORTS = ".shards"  # directory of the reports of finished jobs
SETTINGS_NAME = "settings.json"


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of work. `fingerprint` stands for its input: another one means that the job is done anew."""

    name: str
    fingerprint: str
    payload: Any
    outputs: tuple[str, ...] = ()  # every file that it may write, relative to the directory
    origin: str = ""  # where its input lies: the same name from elsewhere is other work


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished job wrote and what became of its clips."""

    outputs: dict[str, str]  # path relative to the directory -> SHA-256
    counts: dict[str, int]
    dropped: list[dict[str, str]] = field(default_factory=list)  # file, reason, detail
    keys: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    settings: str = ""
    origin: str = ""


Work = Callable[[Job, Path, Any], Report]


def fingerprint(value: Any) -> str:
    """A digest of a JSON value that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def run_jobs(
    work: Work,
    jobs: Sequence[Job],
    directory: Path,
    settings: dict[str, Any],
    config: Any,
    workers: int,
    replace: bool = False,
    *,
    finished_by: Sequence[str],
) -> list[Report]:
    """Reports of all jobs, in their order; finished ones are not done again.

    `work(job, directory, config)` runs in `workers` processes (1: in this one). `finished_by`: the files that tell
    readers that the directory is finished. The caller writes them last; here they go before the first shard does.
    Raises `ConfigError` when the directory holds work of other settings, `DataError` when it holds shards of other input
    (`replace` removes these instead) and when a job fails, after the others have finished.
    """
    if workers < 1:
        raise ConfigError(f"workers: {workers}; need at least 1")
    with _locked(directory):
        _claim(directory, settings)
        mark, strangers = fingerprint(settings), _strangers(directory, jobs)
        if strangers and not replace:
            raise DataError(f"{directory} holds shards that are not made from this input: "
                            f"{_named(strangers, directory)}. Give another --out to keep them, name their input too, "
                            "or remove them with --replace")  # fmt: skip
        todo = [job for job in jobs if _finished(directory, job, mark) is None]
        if strangers or todo:
            for name in finished_by:
                (directory / name).unlink(missing_ok=True)
        _remove(strangers, directory)
        _sweep(directory)
        if len(todo) < len(jobs):
            log.info("%s: %d of %d shards are finished already", directory, len(jobs) - len(todo), len(jobs))
        failures = {}
        for job, outcome in _outcomes(work, todo, directory, config, workers):
            if isinstance(outcome, Ltx2Error):
                failures[job.name] = outcome
                log.error("%s: %s", job.name, outcome)
            else:
                _record(directory, job, outcome, mark)
        if failures:
            first = next(iter(failures.values()))
            raise DataError(f"{len(failures)} of {len(jobs)} shards failed; the others are finished. First: {first}. "
                            "Run the same command again when the cause is removed")  # fmt: skip
        reports = [_finished(directory, job, mark) for job in jobs]
    return [report for report in reports if report is not None]


def _outcomes(
    work: Work, jobs: Sequence[Job], directory: Path, config: Any, workers: int
) -> Iterator[tuple[Job, Report | Ltx2Error]]:
    """Each job with its report or its error, as they finish."""
    from tqdm import tqdm

    bar = tqdm(total=len(jobs), unit="shard", disable=not sys.stderr.isatty() or not jobs, leave=False)
    with bar:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                yield job, _one_thread(_guarded, work, job, directory, config)
                bar.update()
            return
        with process_pool(min(workers, len(jobs))) as pool:
            futures = {pool.submit(_guarded, work, job, directory, config): job for job in jobs}
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:
                    yield futures[future], DataError("a worker was killed (out of memory?); use fewer --workers")
                bar.update()


def _guarded(work: Work, job: Job, directory: Path, config: Any) -> Report | Ltx2Error:
    try:
        for name in job.outputs:  # what an earlier input gave must not stay beside what this one gives
            (directory / name).unlink(missing_ok=True)
        return work(job, directory, config)
    except Ltx2Error as error:
        return error
    except OSError as error:
        return DataError(f"{job.name}: {error}. Free space, or correct the path or its rights")


def _one_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value with torch on one thread, as in the workers: the bytes do not depend on their number."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes with one thread each. They start from a clean server, and end when this process is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ltx2_train.media.write"])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what runs is finished, what waits is not begun
                raise
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _start_worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's matter
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{directory}: another run is writing there. Wait for it, or give another --out") from error
        yield


def _claim(directory: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new directory; refuse other settings than those it was begun with."""
    path = directory / SETTINGS_NAME
    if not path.exists():
        write_json(path, settings)
        return
    there = json.loads(path.read_text())
    settings = json.loads(json.dumps(settings))
    changed = [name for name in sorted({*there, *settings}) if there.get(name) != settings.get(name)]
    if changed:
        differences = "; ".join(f"{name}: {there.get(name)} there, {settings.get(name)} now" for name in changed)
        raise ConfigError(f"{directory} was begun with other settings ({differences}). "
                          "Give another --out, or delete that directory to begin anew")  # fmt: skip


def _remove(strangers: Sequence[Path], directory: Path) -> None:
    if strangers:
        log.warning("%s: removed, as they are not made from this input: %s", directory, _named(strangers, directory))
    for path in strangers:
        path.unlink()


def _named(shards: Sequence[Path], directory: Path) -> str:
    names = ", ".join(str(path.relative_to(directory)) for path in shards[:8])
    return names + (f" and {len(shards) - 8} more" if len(shards) > 8 else "")


def _strangers(directory: Path, jobs: Sequence[Job]) -> list[Path]:
    """The shards beside those of `jobs` that none of them writes, or that are of other input under the same name."""
    owners = {directory / name: job for job in jobs for name in job.outputs}
    there = sorted(shard for folder in {path.parent for path in owners} for shard in folder.glob("*.tar"))
    return [shard for shard in there if shard not in owners or _is_of_elsewhere(directory, owners[shard])]


def _is_of_elsewhere(directory: Path, job: Job) -> bool:
    report = _report(directory, job)
    return report is not None and report.origin != job.origin and report.fingerprint != job.fingerprint


def _sweep(directory: Path) -> None:
    """Remove what a killed run left half written."""
    for partial in directory.rglob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def _report_path(directory: Path, job: Job) -> Path:
    return directory / REPORTS / f"{job.name}.json"


def _record(directory: Path, job: Job, report: Report, mark: str) -> None:
    sizes = {name: (directory / name).stat().st_size for name in report.outputs}
    told = {"sizes": sizes, "fingerprint": job.fingerprint, "settings": mark, "origin": job.origin}
    write_json(_report_path(directory, job), asdict(report) | told)


def _report(directory: Path, job: Job) -> Report | None:
    path = _report_path(directory, job)
    return Report(**json.loads(path.read_text())) if path.exists() else None


def _finished(directory: Path, job: Job, mark: str) -> Report | None:
    """The report of a job, if it is there, whole, of this input and these settings, and its shards are there."""
    report = _report(directory, job)
    if report is None or (report.fingerprint, report.settings) != (job.fingerprint, mark):
        return None
    there = (directory / name for name in report.outputs)
    whole = all(p.exists() and p.stat().st_size == report.sizes[n] for p, n in zip(there, report.outputs, strict=True))
    return report if whole else None
