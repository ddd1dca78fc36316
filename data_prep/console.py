"""What the programs share at the command line: errors without a traceback, and lists of files."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from ltx2_train.cli.entry import EXIT_ERROR
from ltx2_train.errors import Ltx2Error


def parser(program: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help shows defaults and ends with an example."""
    return argparse.ArgumentParser(
        prog=f"python -m data_prep.{program}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=_Help,
    )


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def add_workers(arguments: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    arguments.add_argument("--workers", type=int, default=cores, help="processes; the result does not depend on it")


def add_replace(arguments: argparse.ArgumentParser) -> None:
    text = "remove shards under --out that are not made from this input; without it they are an error that names them"
    arguments.add_argument("--replace", action="store_true", help=text)


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a program; what a user can cause ends it with a message and exit code 2, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(argv)
    except Ltx2Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
