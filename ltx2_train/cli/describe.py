"""Tables of settings, from the dataclasses and the docstrings under their fields, for `--help SECTION` and the docs."""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ltx2_train.errors import ConfigError

MARKER = "<!-- written by python -m ltx2_train.cli.describe docs/configuration.md -->"


@dataclass(frozen=True, slots=True)
class Setting:
    name: str  # dotted
    default: str
    meaning: str


def settings(schema: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a dataclass and of those inside it. Elements of lists of dataclasses are numbered from 0."""
    hints, meanings = get_type_hints(schema), field_docstrings(schema)
    for f in fields(schema):
        name, inner = f"{prefix}{f.name}", _dataclass_in(hints[f.name])
        if inner is None:
            yield Setting(name, _default(f), _meaning(hints[f.name], meanings.get(f.name, "")))
        else:
            is_list = get_origin(hints[f.name]) is list
            yield from settings(inner, f"{name}.0." if is_list else f"{name}.")


def setting_names(schema: type) -> list[str]:
    return [setting.name for setting in settings(schema)]


def describe(schema: type, section: str) -> str:
    """The settings of one section as text. Raises `ConfigError` naming the sections when there is none of that name."""
    found = [s for s in settings(schema) if s.name == section or s.name.startswith(f"{section}.")]
    if not found:
        sections = sorted({s.name.rsplit(".", 1)[0] for s in settings(schema) if "." in s.name})
        raise ConfigError(f"{section}: no such section; there are {', '.join(sections)}")
    return "\n".join(f"{s.name} = {s.default}\n{textwrap.indent(textwrap.fill(s.meaning, 100), '    ')}" for s in found)


def markdown(schema: type) -> str:
    """One table per section, for the documentation."""
    lines: list[str] = []
    section = None
    for s in settings(schema):
        owner = s.name.rsplit(".", 1)[0] if "." in s.name else "top level"
        if owner != section:
            section = owner
            lines += ["", f"### {owner}", "", "| setting | default | meaning |", "|---|---|---|"]
        lines.append(f"| `{s.name}` | `{s.default}` | {s.meaning.replace('|', '/')} |")
    return "\n".join(lines).strip() + "\n"


def field_docstrings(owner: type) -> dict[str, str]:
    """The string that stands under each field, in one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[statement.target.id] = " ".join(text.split())
    return found


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a field holds: itself, in a list, or optionally."""
    if get_origin(hint) in (list, Union, types.UnionType):
        return next((found for arg in get_args(hint) if (found := _dataclass_in(arg))), None)
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def _default(f: Any) -> str:
    if f.default is MISSING and f.default_factory is MISSING:
        return "required"
    return _shown(f.default if f.default is not MISSING else f.default_factory())


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)


def _meaning(hint: Any, text: str) -> str:
    """The docstring, with the words that an enumeration allows."""
    options = [arg for arg in (hint, *get_args(hint)) if isinstance(arg, type) and issubclass(arg, Enum)]
    names = ", ".join(member.name for option in options for member in option)
    return f"{text} ({names})".strip() if names else text


def renew(path: Path) -> None:
    """Writes the tables of all settings of a training job into a document, below its marker line."""
    from ltx2_train.cli.schema import TrainJob

    head, marker, _ = path.read_text(encoding="utf-8").partition(MARKER)
    path.write_text(f"{head}{marker}\n\n{markdown(TrainJob)}", encoding="utf-8")


if __name__ == "__main__":
    renew(Path(sys.argv[1]))
