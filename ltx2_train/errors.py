"""What a user can cause. Every message names the thing, the bound and the next action; our own invariants are asserts."""


class Ltx2Error(Exception):
    """Base of all errors that are shown without a traceback by the command-line programs."""

    agreed = False  # True where all ranks raise it together, none of them in a collective: all can go on alike


class ConfigError(Ltx2Error, ValueError):
    """A setting is unknown, of the wrong type or out of its bound."""


class DataError(Ltx2Error, ValueError):
    """A media file, record, shard, index or manifest is not what it should be."""


class CheckpointError(Ltx2Error, RuntimeError):
    """A checkpoint or weights file is incomplete, damaged or belongs to something else."""


class NonFiniteError(Ltx2Error, ArithmeticError):
    """Update after update was bad: not finite, too large or too far off, and no rollback is left or possible.

    None of them was applied, and the last checkpoint stays.
    """
