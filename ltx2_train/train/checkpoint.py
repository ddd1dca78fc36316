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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx2_train.distributed.engine import Engine, PendingSave
from ltx2_train.distributed.world import World, agreed
from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.train.state import check_same_run

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CONFIG = "config.json"
FORMAT = 1
PARTIAL = ".partial-"
REPLACED = ".replaced-"
SET_ASIDE = "set-aside-"
POLL_SECONDS = 0.05
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
    """What a run goes on from. `state`: as it was given to `save`."""

    step: int
    directory: Path
    state: dict[str, Any]


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Directories whose manifest is whole and whose files are there in full size, newest first. Warns of the others."""
    complete = []
    for directory in _step_directories(Path(run_dir) / "checkpoints"):
        try:
            _check_sizes(directory, read_manifest(directory))
            complete.append(directory)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return complete


def newest_complete(run_dir: Path) -> Path | None:
    """The newest complete checkpoint. Its hashes are verified when it is loaded."""
    return next(iter(complete_checkpoints(run_dir)), None)


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


def verify(directory: Path, names: Iterable[str] | None = None) -> None:
    """Raises `CheckpointError` naming the first file (of `names`, or of all) that is not as it was written."""
    manifest = read_manifest(directory)
    _check_sizes(directory, manifest)
    for name in manifest["files"] if names is None else names:
        if _hash(directory / name) != manifest["files"][name]["sha256"]:
            raise CheckpointError(f"{directory / name}: its SHA-256 is not that of the manifest; the file is damaged")


@dataclass
class Checkpointer:
    """Writes, keeps and reads the checkpoints of one run. All ranks call every method together.

    Saving goes on in a thread. The ranks find out about each other through files in the hidden directory, so the thread
    needs no collective of its own: each rank leaves its hashes when its part is on disk, and rank 0 completes the
    checkpoint when all have.
    """

    run_dir: Path
    world: World
    keep_last: int = 2
    """Newest checkpoints that stay; 0: all. The one just written always stays."""
    keep_every: int = 0
    """Checkpoints at multiples of this step stay for good; 0: none."""
    identity: dict[str, Any] = field(default_factory=dict)
    """The settings that define the run, flat: a checkpoint with others is refused."""
    timeout_seconds: float = 3600.0
    """How long rank 0 waits for the others' files."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)}: must be 0 or more")
        self.root = Path(self.run_dir) / "checkpoints"
        self.identity = json.loads(json.dumps(self.identity))
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        if self.world.is_main:
            self.root.mkdir(parents=True, exist_ok=True)
            _tidy(self.root)
        self.world.barrier()

    def save(self, step: int, engine: Engine, state: dict[str, Any], config: dict[str, Any]) -> Path:
        """Starts to write the checkpoint of this moment and says where it will be; training may go on meanwhile.

        `state`: as `extra` of `Engine.save`. An earlier save is waited for first; its `CheckpointError` is raised here.
        """
        begin = time.monotonic()
        self.wait()
        final = checkpoint_directory(self.run_dir, step)
        partial = self.root / f"{PARTIAL}{final.name}"
        agreed(self.world, lambda: self._open(step, partial))
        pending = engine.save(partial, state)
        self._thread = threading.Thread(
            target=self._complete, args=(step, pending, partial, final, json.dumps(config), begin), daemon=True
        )
        self._thread.start()
        return final

    def poll(self) -> Saved | None:
        """The checkpoint that has become complete on all ranks since the last call, if any.

        Raises the save's `CheckpointError`, the same on all ranks.
        """
        if self._thread is None or any(self.world.gather_objects(self._thread.is_alive())):
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Blocks until no save is in flight; otherwise as `poll`."""
        return None if self._thread is None else agreed(self.world, self._join)

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
        older checkpoint is taken and the damaged one set aside. Raises `CheckpointError` when a checkpoint is there but
        belongs to another run or model, or when none of them is good: a run never starts anew by mistake.
        """
        chosen = self._first_good() if directory is None else self._only(Path(directory))
        if chosen is None:
            return None
        state = engine.load(chosen, template or {})
        step = read_manifest(chosen)["step"]
        self._set_newer_aside(chosen, step)
        logger.info("going on from %s (step %d)", chosen, step)
        return Restored(step, chosen, state)

    def last_before(self, step: int) -> Path | None:
        """The newest good checkpoint of a step below `step`, which has shown that training goes on from it; if there is
        none, that of `step` itself. None where there is neither.
        """
        found = complete_checkpoints(self.run_dir) if self.world.is_main else []
        found = self.world.broadcast_object([d for d in found if _step_of(d) <= step])
        older = [directory for directory in found if _step_of(directory) < step]
        for candidate in [*older, *(d for d in found if d not in older)]:
            damage = self._damage(candidate)
            if not damage:
                return candidate
            logger.error("DAMAGED CHECKPOINT: %s", damage)
        return None

    def _first_good(self) -> Path | None:
        listing = (_step_directories(self.root), complete_checkpoints(self.run_dir)) if self.world.is_main else ([], [])
        found, candidates = self.world.broadcast_object(listing)
        for candidate in candidates:
            check_same_run(read_manifest(candidate)["identity"], self.identity, str(candidate))
            damage = self._damage(candidate)
            if not damage:
                return candidate
            logger.error("DAMAGED CHECKPOINT: %s. Going on from the one before it", damage)
            self._set_aside(candidate)
        if found:
            raise CheckpointError(
                f"{self.root}: none of {', '.join(d.name for d in found)} can be read (messages above). "
                "Restore one from a backup, or start anew in another run directory"
            )
        return None

    def _only(self, directory: Path) -> Path:
        check_same_run(read_manifest(directory)["identity"], self.identity, str(directory))
        damage = self._damage(directory)
        if damage:
            others = [d for d in complete_checkpoints(directory.parent.parent) if d.name < directory.name]
            offer = f"the complete one before it is {others[0]}" if others else "there is no complete one before it"
            raise CheckpointError(f"{damage}; {offer}")
        return directory

    def _damage(self, directory: Path) -> str:
        """What is wrong with the files, the same answer on all ranks; each rank reads its share of them."""
        try:
            names = sorted(read_manifest(directory)["files"])
            verify(directory, names[self.world.rank :: self.world.size])
            own = ""
        except CheckpointError as error:
            own = str(error)
        return next((message for message in self.world.gather_objects(own) if message), "")

    def _set_newer_aside(self, chosen: Path, step: int) -> None:
        """Checkpoints beyond the one that was asked for belong to a course that is given up."""
        same = chosen.resolve().parent == self.root.resolve()
        newer = [d for d in _step_directories(self.root) if _step_of(d) > step] if same else []
        self.world.barrier()
        for directory in newer:
            self._set_aside(directory)

    def _set_aside(self, directory: Path) -> None:
        target = directory.with_name(f"{SET_ASIDE}{directory.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if self.world.is_main:
            logger.warning("%s is set aside as %s", directory, target.name)
            directory.rename(target)
        self.world.barrier()

    def _complete(self, step: int, pending: PendingSave, partial: Path, final: Path, config: str, begin: float) -> None:
        """The thread's story: own part, the others' parts, manifest, rename, retention."""
        try:
            own = self._leave_marker(pending, partial)
            if self.world.is_main:
                self._finish(step, partial, final, config)
            else:
                self._await_finish(partial, final, own)
            num_bytes = sum(entry["bytes"] for entry in read_manifest(final)["files"].values())
            self._outcome = Saved(step, final, num_bytes, time.monotonic() - begin)
        except BaseException as error:
            self._outcome = error  # should the directory be gone, so that nothing can be said of it
            self._outcome = self._explained(step, error, pending.num_bytes)

    def _leave_marker(self, pending: PendingSave, partial: Path) -> dict[str, Any]:
        """Waits for this rank's files and leaves their hashes, or why there are none; gives the same."""
        marker: dict[str, Any] = {"files": {}, "error": ""}
        try:
            pending.wait()
            marker["files"] = {path.name: _entry(path) for path in pending.files()}
        except Exception as failure:
            marker["error"] = (
                str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"
            )
            for path in pending.files():
                path.unlink(missing_ok=True)  # on a full disk even a marker needs room
        _write_whole(partial / _marker(self.world.rank), marker)
        return marker

    def _finish(self, step: int, partial: Path, final: Path, config: str) -> None:
        """Rank 0: makes the checkpoint visible, or removes what there is of it."""
        try:
            markers = self._await_markers(partial)
            if errors := [marker["error"] for marker in markers if marker["error"]]:
                raise CheckpointError(errors[0])
            (partial / CONFIG).write_text(config)
            files = {name: entry for marker in markers for name, entry in marker["files"].items()}
            self._publish(step, partial, final, files)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._forget_old(final)

    def _await_markers(self, partial: Path) -> list[dict[str, Any]]:
        paths = [partial / _marker(rank) for rank in range(self.world.size)]
        deadline = time.monotonic() + self.timeout_seconds
        while missing := [rank for rank, path in enumerate(paths) if not path.exists()]:
            if time.monotonic() > deadline:
                raise CheckpointError(f"ranks {missing} have not written their part in {self.timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)
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
        manifest["files"] = files
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
        deadline = time.monotonic() + self.timeout_seconds
        while partial.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(f"rank 0 has not completed it in {self.timeout_seconds:.0f} s")
            time.sleep(POLL_SECONDS)
        if own["error"]:
            raise CheckpointError(own["error"])
        if not final.exists() or not own["files"].items() <= read_manifest(final)["files"].items():
            raise CheckpointError("rank 0 could not complete it and says why")

    def _forget_old(self, final: Path) -> None:
        """Removes what neither `keep_last` nor `keep_every` holds; called once `final` is complete."""
        if not self.keep_last:
            return
        directories = _step_directories(self.root)
        kept = {final, *directories[: self.keep_last]}
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
    found = [path for path in root.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _marker(rank: int) -> str:
    return f".rank-{rank:05d}.json"


def _check_sizes(directory: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path}: the file is missing")
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, {entry['bytes']} were written; the file is damaged")


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
