"""A setting that is one of a few words."""

from enum import StrEnum
from typing import TypeVar

from ltx2_train.errors import ConfigError

Choice = TypeVar("Choice", bound=StrEnum)


def chosen(choices: type[Choice], value: str, name: str) -> Choice:
    """The member of `choices` that `value` names. Raises `ConfigError` with the field's `name` and the known words."""
    try:
        return choices(value)
    except ValueError:
        known = ", ".join(member.value for member in choices)
        raise ConfigError(f"{name}={value!r}: not known; choose one of {known}") from None
