"""Checkpoints that are complete or invisible.

`checkpoints/step-00000123/` holds the engine's files, `config.json` and `manifest.json` with the size and SHA-256 of
every file. Everything is written into a hidden directory beside it first; the rename is the last thing that happens.
Nothing is read from a checkpoint but JSON until its hashes agree.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ltx2_train.distributed.engine import Engine, PendingSave
from ltx2_train.distributed.world import TIMEOUT_SECONDS, World, agreed, from_main
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.train.state import Changes, check_same_run

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONFIG = "config.json"
FORMAT = 1
PARTIAL = ".partial-"
REPLACED = ".replaced-"
SET_ASIDE = "set-aside-"
POLL_SECONDS = 0.05
EXCHANGE_SECONDS = 1.0  # between two times that ranks which wait for a save tell each other of failures
SETTLE_SECONDS = 600.0  # what a run that ends with an error gives the checkpoint in flight
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that has become complete."""

    step: int
    directory: Path
    num_bytes: int
    seconds: float  # from the call of `save` to completeness


@dataclass(frozen=True, slots=True)
class Restored:
    """What a run goes on from. `state`: as it was given to `save`. `changes`: settings that are others now."""

    step: int
    directory: Path
    state: dict[str, Any]
    changes: Changes


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Directories whose manifest is whole and whose files are there in full size, newest first. Warns of the others."""
    return list(_manifests(run_dir))


def newest_complete(run_dir: Path) -> Path | None:
    """The newest complete checkpoint. Its hashes are verified when it is loaded."""
    return next(iter(complete_checkpoints(run_dir)), None)


def _manifests(run_dir: Path) -> dict[Path, dict[str, Any]]:
    """The manifests of the complete checkpoints."""
    complete = {}
    for directory in all_checkpoints(run_dir):
        try:
            manifest = read_manifest(directory)
            _check_sizes(directory, manifest)
            complete[directory] = manifest
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return complete


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest; raises `CheckpointError` when it is missing, damaged or not of this directory."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        whole = manifest.pop("digest") == _digest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no readable manifest ({error}); incomplete or damaged") from error
    if not whole or manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: the manifest is damaged or of another version (this one is {FORMAT})")
    return manifest


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Complete or not, newest first."""
    return _step_directories(Path(run_dir) / "checkpoints")


def holds_checkpoints(run_dir: Path) -> bool:
    """Whether there are any, complete or not."""
    return bool(all_checkpoints(run_dir))


def noted_origin(directory: Path) -> str:
    """Where the course of a checkpoint began: the path that train.resume named, `never`, or nothing."""
    return read_manifest(directory).get("origin", "")


def verify(directory: Path, names: Iterable[str] | None = None) -> None:
    """Raises `CheckpointError` naming the first file (of `names`, or of all) that is not as it was written."""
    manifest = read_manifest(directory)
    _check_sizes(directory, manifest)
    for name in manifest["files"] if names is None else names:
        path = directory / name
        with _reading(path):
            same = _hash(path) == manifest["files"][name]["sha256"]
        if not same:
            raise CheckpointError(f"{path}: its SHA-256 is not that of the manifest; the file is damaged")


@dataclass
class Checkpointer:
    """Writes, keeps and reads the checkpoints of one run. All ranks call every method together.

    Saving goes on in a thread. The ranks find out about each other through files in the hidden directory, so the thread
    needs no collective of its own: each rank leaves its hashes when its part is on disk, and rank 0 completes the
    checkpoint when all have. While all of them wait for a save they also tell each other of failures.
    """

    run_dir: Path
    world: World
    keep_last: int = 2
    """Newest checkpoints that stay; 0: all. The one just written always stays."""
    keep_every: int = 0
    """Checkpoints at multiples of this step stay for good; 0: none."""
    identity: dict[str, Any] = field(default_factory=dict)
    """The settings that define the run, flat: a checkpoint with others is refused."""
    change: Sequence[str] = ()
    """Patterns of the settings in which a checkpoint may differ nevertheless."""
    origin: str = ""
    """Where this course began; written into its checkpoints. See `noted_origin`."""
    timeout_seconds: float = TIMEOUT_SECONDS / 2
    """How long rank 0 waits for the others' files, and they for it: less than a collective may hang."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)}: must be 0 or more")
        self.root = Path(self.run_dir) / "checkpoints"
        self.identity = json.loads(json.dumps(self.identity))
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self._failure = ""  # of any rank, in the save that is in flight
        from_main(self.world, self._make_ready)

    def _make_ready(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        _tidy(self.root)

    def save(
        self,
        step: int,
        engine: Engine,
        state: dict[str, Any],
        config: dict[str, Any],
        *,
        back_to: int | None = None,
    ) -> Path:
        """Starts to write the checkpoint of this moment and says where it will be; training may go on meanwhile.

        `state`: as `extra` of `Engine.save`. `back_to`: the newest checkpoint up to this step stays, whatever `keep_last`
        says, because a rollback would lead there. An earlier save is waited for first; its `CheckpointError` is raised here.
        """
        begin = time.monotonic()
        self.wait()
        self._failure = ""
        final = checkpoint_directory(self.run_dir, step)
        partial = self.root / f"{PARTIAL}{final.name}"
        agreed(self.world, lambda: self._open(step, partial))
        pending = engine.save(partial, state)
        kept = step if back_to is None else back_to
        self._thread = threading.Thread(
            target=self._complete, args=(step, pending, partial, final, json.dumps(config), kept, begin), daemon=True
        )
        self._thread.start()
        return final

    def poll(self) -> Saved | None:
        """The checkpoint that has become complete on all ranks since the last call, if any.

        Raises the save's `CheckpointError`, the same on all ranks.
        """
        if self._thread is None or self._exchange(self._thread):
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Blocks until no save is in flight; otherwise as `poll`."""
        if self._thread is None:
            return None
        while self._exchange(self._thread):
            self._thread.join(EXCHANGE_SECONDS)
        return agreed(self.world, self._join)

    def _exchange(self, thread: threading.Thread) -> bool:
        """Whether any rank still writes. A failure of one is told to all: none of them need wait for its part."""
        outcome, alive = self._outcome, thread.is_alive()
        own = str(outcome.__cause__ or outcome) if isinstance(outcome, BaseException) else ""
        told = self.world.gather_objects((alive, own))
        failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(told) if failure]
        self._failure = next(iter(failures), "")
        return any(alive for alive, _ in told)

    def settle(self, seconds: float = SETTLE_SECONDS) -> Saved | None:
        """As `wait`, but of this rank alone, bounded and without raising: for a run that ends with another error."""
        if self._thread is None:
            return None
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.error("the checkpoint in flight was not complete after %.0f s and is given up", seconds)
            return None
        try:
            return self._join()
        except CheckpointError as error:
            logger.error("%s", error)
            return None

    def _join(self) -> Saved:
        assert self._thread is not None
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Saved):
            return outcome
        raise outcome or CheckpointError(f"saving in {self.root} failed")

    def _open(self, step: int, partial: Path) -> None:
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._explained(step, error, 0) from error

    def load(
        self, engine: Engine, template: dict[str, Any] | None = None, directory: Path | None = None
    ) -> Restored | None:
        """Goes on from `directory`, or else from the newest good checkpoint; None if the run has none yet.

        `template`: tensors to be filled, as in `Engine.load`. A damaged `directory` is an error; without one the next
        older checkpoint is taken. Those beyond it are set aside, and all of this run's if it lies elsewhere: they belong to
        a course that is given up. Raises `CheckpointError` when a checkpoint is there but belongs to another run or model,
        or when none of them is good: a run never starts anew by mistake.
        """
        found = self._first_good() if directory is None else self._only(Path(directory))
        if found is None:
            return None
        chosen, step, changes = found
        state = engine.load(chosen, template or {})
        from_main(self.world, lambda: self._set_others_aside(chosen, step))
        logger.info("going on from %s (step %d)", chosen, step)
        return Restored(step, chosen, state, changes)

    def last_before(self, step: int) -> Path | None:
        """The newest good checkpoint of a step below `step`, which has shown that training goes on from it; if there is
        none, that of `step` itself. None where there is neither.
        """
        complete = from_main(self.world, lambda: complete_checkpoints(self.run_dir))
        found = [directory for directory in complete if _step_of(directory) <= step]
        older = [directory for directory in found if _step_of(directory) < step]
        for candidate in [*older, *(d for d in found if d not in older)]:
            damage = self._damage(candidate)
            if not damage:
                return candidate
            logger.error("DAMAGED CHECKPOINT: %s", damage)
        return None

    def _first_good(self) -> tuple[Path, int, Changes] | None:
        found, complete = from_main(self.world, lambda: (_step_directories(self.root), _manifests(self.run_dir)))
        for candidate, manifest in complete.items():
            changes = self._differences(candidate, manifest)
            damage = self._damage(candidate)
            if not damage:
                return candidate, manifest["step"], changes
            logger.error("DAMAGED CHECKPOINT: %s. Going on from the one before it", damage)
        if found:
            raise CheckpointError(
                f"{self.root}: none of {', '.join(d.name for d in found)} can be read (messages above). "
                "Restore one from a backup, or start anew in another run directory"
            )
        return None

    def _only(self, directory: Path) -> tuple[Path, int, Changes]:
        manifest = from_main(self.world, lambda: read_manifest(directory))
        changes = self._differences(directory, manifest)
        damage = self._damage(directory)
        if damage:
            complete = from_main(self.world, lambda: complete_checkpoints(directory.parent.parent))
            others = [d for d in complete if d.name < directory.name]
            offer = f"the complete one before it is {others[0]}" if others else "there is no complete one before it"
            raise CheckpointError(f"{damage}; {offer}")
        return directory, manifest["step"], changes

    def _differences(self, directory: Path, manifest: dict[str, Any]) -> Changes:
        """Settings that are others now. Raises `CheckpointError` when it is another run's."""
        return check_same_run(manifest["identity"], self.identity, str(directory), self.change)

    def _damage(self, directory: Path) -> str:
        """What is wrong with the files, the same answer on all ranks; each rank reads its share of them."""
        try:
            names = sorted(read_manifest(directory)["files"])
            verify(directory, names[self.world.rank :: self.world.size])
            own = ""
        except CheckpointError as error:
            own = str(error)
        return next((message for message in self.world.gather_objects(own) if message), "")

    def _set_others_aside(self, chosen: Path, step: int) -> None:
        """Rank 0: the checkpoints that `load` speaks of, and what all that are set aside take."""
        own = chosen.resolve().parent == self.root.resolve()
        for directory in _step_directories(self.root):
            if not own or _step_of(directory) > step:
                target = directory.with_name(f"{SET_ASIDE}{directory.name}-{datetime.now():%Y%m%d-%H%M%S.%f}")
                logger.warning("%s is set aside as %s", directory, target.name)
                directory.rename(target)
        if aside := list(self.root.glob(f"{SET_ASIDE}*")):
            gigabytes, pattern = sum(map(_num_bytes, aside)) / 1e9, self.root / f"{SET_ASIDE}*"
            logger.warning(
                "checkpoints set aside: %d, %.3g GB. Nothing reads them: rm -r %s", len(aside), gigabytes, pattern
            )

    def _complete(
        self, step: int, pending: PendingSave, partial: Path, final: Path, config: str, back_to: int, begin: float
    ) -> None:
        """The thread's story: own part, the others' parts, manifest, rename, retention."""
        try:
            own = _own_part(pending)
            if self.world.is_main:
                self._finish(step, partial, final, config, own)
                self._forget_old(final, back_to)
            else:
                _write_whole(partial / _marker(self.world.rank), own)
                self._await_finish(partial, final, own)
            self._outcome = Saved(step, final, _num_bytes(final), time.monotonic() - begin)
        except BaseException as error:
            self._outcome = error  # should the directory be gone, so that nothing can be said of it
            self._outcome = self._explained(step, error, pending.num_bytes)

    def _finish(self, step: int, partial: Path, final: Path, config: str, own: dict[str, Any]) -> None:
        """Rank 0: makes the checkpoint visible, or removes what there is of it. After an error of its own part at once."""
        try:
            markers = [own] if own["error"] else [own, *self._await_markers(partial)]
            if errors := [marker["error"] for marker in markers if marker["error"]]:
                raise CheckpointError(errors[0])
            (partial / CONFIG).write_text(config)
            files = {name: entry for marker in markers for name, entry in marker["files"].items()}
            self._publish(step, partial, final, files)
        except BaseException:
            _remove(partial)
            raise

    def _await_markers(self, partial: Path) -> list[dict[str, Any]]:
        paths = [partial / _marker(rank) for rank in range(1, self.world.size)]

        def missing() -> list[int]:
            return [rank for rank, path in enumerate(paths, start=1) if not path.exists()]

        self._until(lambda: not missing(), lambda: f"ranks {missing()} have not written their part")
        markers = [json.loads(path.read_text()) for path in paths]
        for path in paths:
            path.unlink()
        return markers

    def _publish(self, step: int, partial: Path, final: Path, files: dict[str, Any]) -> None:
        """Manifest, fsync, rename: from the rename on the checkpoint exists."""
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            name = path.relative_to(partial).as_posix()
            if name not in files:
                files[name] = _entry(path)
        manifest = {"format": FORMAT, "step": step, "world_size": self.world.size, "identity": self.identity}
        manifest |= {"origin": self.origin, "files": files}
        _write_whole(partial / MANIFEST, manifest | {"digest": _digest(manifest)})
        _sync(partial)
        replaced = final.with_name(f"{REPLACED}{final.name}")
        if final.exists():  # saved again after a resume from an older one: both are there until the new one is
            _discard(replaced)
            final.rename(replaced)
        partial.rename(final)
        _sync(final.parent)
        _discard(replaced)

    def _await_finish(self, partial: Path, final: Path, own: dict[str, Any]) -> None:
        """Other ranks: wait until rank 0 has renamed or removed the directory that holds this rank's part."""
        self._until(lambda: not partial.exists(), lambda: "rank 0 has not completed it")
        if own["error"]:
            raise CheckpointError(own["error"])
        if not final.exists() or not own["files"].items() <= read_manifest(final)["files"].items():
            raise CheckpointError("rank 0 could not complete it and says why")

    def _until(self, done: Callable[[], bool], late: Callable[[], str]) -> None:
        """Waits. Raises `CheckpointError` as soon as a rank has told of its failure, and when the time is up."""
        deadline = time.monotonic() + self.timeout_seconds
        while not done():
            if self._failure:
                raise CheckpointError(self._failure)
            if time.monotonic() > deadline:
                raise CheckpointError(f"{late()} in {self.timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)

    def _forget_old(self, final: Path, back_to: int) -> None:
        """Removes what neither `keep_last` nor `keep_every` nor a rollback needs; called once `final` is complete."""
        if not self.keep_last:
            return
        directories = _step_directories(self.root)
        kept = {final, *directories[: self.keep_last]}
        kept |= set([d for d in directories if _step_of(d) <= back_to][:1])
        for directory in directories:
            if directory not in kept and not (self.keep_every and _step_of(directory) % self.keep_every == 0):
                _remove(directory)

    def _explained(self, step: int, error: BaseException, num_bytes: int) -> CheckpointError:
        """The error with what a person needs to act on it."""
        free = shutil.disk_usage(self.root).free
        last = newest_complete(self.run_dir)
        explained = CheckpointError(
            f"saving step {step} in {self.root} failed: {error}. "
            f"It needs {num_bytes:,} bytes and {free:,} are free there. "
            + (f"The last complete checkpoint, {last}, stays." if last else "There is no earlier checkpoint.")
        )
        explained.__cause__ = error
        return explained


def _step_directories(root: Path) -> list[Path]:
    """Directories named as checkpoints, complete or not, newest first."""
    if not root.exists():
        return []
    with _reading(root):  # a directory that cannot be listed is not an empty one
        found = [path for path in root.iterdir() if _STEP.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _own_part(pending: PendingSave) -> dict[str, Any]:
    """Waits for this rank's files; gives their sizes and hashes, or why there are none."""
    try:
        pending.wait()
        return {"files": {path.name: _entry(path) for path in pending.files()}, "error": ""}
    except Exception as failure:
        for path in pending.files():
            path.unlink(missing_ok=True)  # on a full disk even a marker needs room
        known = isinstance(failure, CheckpointError)
        return {"files": {}, "error": str(failure) if known else f"{type(failure).__name__}: {failure}"}


def _num_bytes(directory: Path) -> int:
    """Of a checkpoint; 0 where its manifest does not say."""
    try:
        return sum(entry["bytes"] for entry in read_manifest(directory)["files"].values())
    except CheckpointError:
        return 0


def _marker(rank: int) -> str:
    return f".rank-{rank:05d}.json"


def _check_sizes(directory: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        path = directory / name
        with _reading(path):
            size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path}: the file is missing")
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, {entry['bytes']} were written; the file is damaged")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the system does not let one read is as good as damaged."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def _entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is on the disk afterwards."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_whole(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees all of it or no file."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync(directory: Path) -> None:
    """A rename is on the disk once its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    """Removes a checkpoint so that a half-removed one is never seen. One that cannot be removed costs only its room."""
    hidden = directory.with_name(f"{PARTIAL}removed-{directory.name}")
    _discard(hidden)
    try:
        directory.rename(hidden)
    except OSError as error:
        logger.warning("%s is no longer needed but cannot be removed: %s", directory, error)
    _discard(hidden)


def _discard(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return  # nothing there, or gone meanwhile
    except OSError as error:
        logger.warning("%s is no longer needed but cannot be removed: %s", directory, error)


def _tidy(root: Path) -> None:
    """Removes what a killed run left half-written, and puts back what it was about to replace."""
    for replaced in root.glob(f"{REPLACED}*"):
        final = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if final.exists():
            _discard(replaced)
        else:
            logger.warning("%s: its successor was not completed; it is put back as %s", replaced, final.name)
            replaced.rename(final)
    for leftover in root.glob(f"{PARTIAL}*"):
        logger.warning("%s: left by a run that was killed while saving; removed", leftover)
        _discard(leftover)
