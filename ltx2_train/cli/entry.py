"""The door: help, composition of the configuration, and one clean message for what a user can cause."""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any

from ltx2_train.errors import Ltx2Error

logger = logging.getLogger(__name__)

EXIT_ERROR = 2  # a mistake that the message explains; running the same again will not help
# How OmegaConf takes a setting inside a section that is null, or a whole value for it.
_NULL_SECTION = re.compile(r"Unexpected type for root: NoneType|'NoneType' object has no attribute 'get'")
# How Hydra takes + before an option of a group.
_CHOSEN_TWICE = re.compile(r"Multiple values for (.+?)\. To override a value use 'override \1: (.+?)'")
_HYDRA_FLAGS = """Flags:
  --cfg job             print the whole configuration that these arguments give, and stop
  --help SECTION        every setting of a section (train, optim, data.plan, ...) with its default and meaning
  -m, --multirun        one job for every combination of comma-separated values, each with its own run directory
  --config-dir RUN --config-name config
                        the saved configuration of an earlier run
  --hydra-help          what Hydra itself offers"""


def launch(config_name: str, header: str, schema: Callable[[], type], task: Callable[[Any], int]) -> int:
    """Runs one program: `task(job)` with the dataclass that configuration files and arguments compose to.

    Returns its exit code, or 2 after one message for whatever a user can cause. `schema` is asked for the dataclass
    only after help has been answered, so that help does not wait for torch.
    """
    section = _help_wanted(sys.argv[1:])
    if section == "":
        print(f"{header.strip()}\n\nGroups (GROUP=OPTION):\n{_groups()}\n\n{_HYDRA_FLAGS}")
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on instead of printing its own version and exiting
    try:
        return _describe(schema(), section) if section else _run_hydra(config_name, schema(), task)
    except Ltx2Error as error:
        return _fail(config_name, error)
    except Exception as error:
        message = explain(error, schema())
        if message is None:
            raise
        return _fail(config_name, message)


def _fail(program: str, message: object) -> int:
    rank = os.environ.get("RANK", "0")
    place = f" [rank {rank}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"ltx2-{program}{place}: {message}", file=sys.stderr)
    return EXIT_ERROR


def _run_hydra(config_name: str, schema: type, task: Callable[[Any], int]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

    from ltx2_train.cli.schema import register, to_config

    register()
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)
    codes: list[int] = []
    failures: list[Exception] = []

    def job(cfg: DictConfig) -> None:
        try:
            codes.append(task(to_config(_placed(cfg), schema)))
        except Exception as error:  # the other jobs of a sweep still run
            failures.append(error)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                logger.error("job %d failed: %s", len(codes) + len(failures) - 1, explain(error, schema) or error)
        if codes and codes[-1]:
            raise SystemExit(codes[-1])  # a signal ends the sweep too

    hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)(job)()
    if failures:
        raise failures[0]
    return 0


def _placed(cfg: Any) -> Any:
    """The configuration with the run directory that Hydra made for this job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    if HydraConfig.get().mode is RunMode.MULTIRUN:
        OmegaConf.update(cfg, "train.run_dir", HydraConfig.get().runtime.output_dir)
    return cfg


def job_name(number: int, overrides: Iterable[str]) -> str:
    """Directory of one job of a sweep: its number and what it alone was given, as far as that fits a file name."""
    swept = [o.lstrip("+~") for o in overrides if o not in sys.argv and "/" not in o]
    return re.sub(r"[^\w.=,+-]", "_", "-".join([str(number), ",".join(swept)]))[:120].rstrip("-")


def _help_wanted(arguments: list[str]) -> str | None:
    """The section asked for, empty for all; None where no help is asked for."""
    for i, argument in enumerate(arguments):
        if argument in ("-h", "--help"):
            return next(iter(arguments[i + 1 :]), "")
    return None


def _describe(schema: type, section: str) -> int:
    from ltx2_train.cli.describe import describe

    print(describe(schema, section))
    return 0


def _groups() -> str:
    """Every group of configuration files with its options, and the first line of each file."""
    lines = []
    for group in sorted(
        entry.name for entry in files("conf").iterdir() if entry.is_dir() and entry.name.isidentifier()
    ):
        options = sorted((f for f in files("conf").joinpath(group).iterdir() if f.name.endswith(".yaml")), key=str)
        names = [f"{group}={f.name.removesuffix('.yaml')}" for f in options]
        lines += [f"  {name:<20} {_first_comment(f.read_text())}" for name, f in zip(names, options, strict=True)]
    return "\n".join(lines)


def _first_comment(text: str) -> str:
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next((c for c in comments if c and not c.startswith("@package")), "")


def explain(error: BaseException, schema: type) -> str | None:
    """What a person needs to know of an error of configuration: which setting, and what would be right. Else None."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf import errors

    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file is not None:
            return _explain_option(cause)
        if isinstance(cause, OverrideParseException):
            return f"{cause.override!r} is not understood: write SETTING=VALUE ({_first_line(cause)})"
        if isinstance(cause, errors.MissingMandatoryValue):
            return f"{_dotted(cause.full_key)} is needed: give {_dotted(cause.full_key)}=VALUE"
        if isinstance(cause, errors.ConfigAttributeError | errors.ConfigKeyError) and cause.full_key:
            return unknown_setting(_dotted(cause.full_key), schema)
        if isinstance(cause, errors.ValidationError | errors.UnsupportedValueType):
            return f"{_dotted(cause.full_key)}: {_first_line(cause)}"
    for cause in chain:
        if isinstance(cause, HydraException) and (match := re.match(r"Could not override '(.+?)'", str(cause))):
            return unknown_setting(match[1], schema)
        if isinstance(cause, HydraException) and (match := _CHOSEN_TWICE.match(str(cause))):
            choice = f"{match[1]}={match[2]}"
            if f"+{choice}" in sys.argv:
                return f"+{choice}: {match[1]} is a group that has a choice already. Write {choice}, without +"
    if any(isinstance(c, AssertionError | AttributeError) and _NULL_SECTION.search(str(c)) for c in chain):
        return "settings are given for a section that is null: choose an option of its group first (lora=all)"
    known = [c for c in chain if isinstance(c, HydraException | errors.OmegaConfBaseException)]
    return _first_line(known[-1]) if known else None


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _dotted(key: object) -> str:
    """`data.datasets[0].path` as it is written on the command line."""
    return re.sub(r"\[(\d+)\]", r".\1", str(key))


def unknown_setting(name: str, schema: type) -> str:
    """The message for a setting that is not there, with those that are spelled nearly so."""
    from ltx2_train.cli.describe import setting_names

    near = nearest(name, [*setting_names(schema), *_group_names()])
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{name}: there is no such setting{hint} (--cfg job shows all)"


def _explain_option(error: Any) -> str:
    near = difflib.get_close_matches(error.missing_cfg_file.split("/")[-1], error.options or [], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    options = f" (there are {', '.join(sorted(error.options))})" if error.options else ""
    return f"{error.missing_cfg_file}: there is no such configuration file{hint}{options}"


def _group_names() -> list[str]:
    return [entry.name for entry in files("conf").iterdir() if entry.is_dir() and entry.name.isidentifier()]


def nearest(name: str, known: list[str]) -> list[str]:
    """Up to two known names like `name`: whole names first, then the same last part elsewhere."""
    leaf = name.rsplit(".", 1)[-1]
    elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    return list(dict.fromkeys([*elsewhere, *difflib.get_close_matches(name, known, n=2, cutoff=0.7)]))[:2]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def set_up_logging(is_main: bool) -> None:
    """Only the main rank speaks below the level of a warning."""
    if not is_main:
        logging.getLogger().setLevel(logging.WARNING)
