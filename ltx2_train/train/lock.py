"""One run per run directory: a second start of the same command must not touch what the first one writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltx2_train.distributed.lock import lock_directory
from ltx2_train.distributed.world import World


@contextmanager
def lock_run(run_dir: Path, world: World) -> Iterator[None]:
    """`lock_directory` for a run: another one in its directory is refused."""
    taken = (
        f"train.run_dir={run_dir}: another run is using it ({{holder}}). "
        "Wait for its end or stop it, or name another train.run_dir"
    )
    with lock_directory(run_dir, world, taken):
        yield
