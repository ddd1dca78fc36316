"""Python runs this file first in every process whose PYTHONPATH names its folder.

The training program, which knows nothing of it, then leaves the samples of every step in the directory that WITNESS names:
one file per process, one line per step, written before the step is trained:
{"step": from 0, "world": number of processes, "samples": [[position in the global batch, key], ...]}.
"""

import importlib.abc
import importlib.util
import json
import os
import sys

WATCHED = "ltx2_train.train.trainer"


class Finder(importlib.abc.MetaPathFinder):
    """Has the trainer's module witnessed as soon as it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            witness(module.Trainer)

        spec.loader.exec_module = loaded
        return spec


def witness(trainer_type):
    train_step = trainer_type.train_step

    def witnessed(trainer, batches):
        micro_batches = next(batches)
        pairs = [pair for batch in micro_batches for pair in zip(batch.positions, batch.keys, strict=True)]
        line = {"step": trainer.state.step, "world": trainer.world.size, "samples": pairs}
        with open(os.path.join(os.environ["WITNESS"], f"{os.getpid()}.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
        train_step(trainer, iter([micro_batches]))

    trainer_type.train_step = witnessed


if "WITNESS" in os.environ:
    sys.meta_path.insert(0, Finder())
