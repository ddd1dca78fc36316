"""`ltx2-report`: one page that tells what a run did."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Write RUN/report.html from what a run directory holds: losses per modality and per noise level, held-out losses and
figures of the samples over steps, the newest samples as video with sound beside the real clips, the same captions at
earlier steps, throughput, and what went wrong on the way.

Several runs make one page with their curves in one chart each, the settings in which they differ, and their figures and
samples side by side, where they were measured alike.

The page holds everything itself, can be mailed and opens without a network. It may be written while a run goes on."""
EPILOG = """\
examples:
  ltx2-report outputs/demo/run
  ltx2-report outputs/demo/run --out reports/tuesday.html
  ltx2-report outputs/lr/* --out reports/lr.html            up to eight runs side by side"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-report", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, as ltx2-train wrote them")
    p.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (RUN/report.html, comparison.html)")
    p.add_argument(
        "--media-mb",
        type=float,
        default=32,
        metavar="MB",
        help="most that films and pictures may take in the page (32)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that names the next action."""
    options = parser().parse_args(argv)
    from ltx2_train.errors import Ltx2Error

    try:
        path = write(options)
    except Ltx2Error as error:
        print(f"ltx2-report: {error}", file=sys.stderr)
        return 2
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def write(options: argparse.Namespace) -> Path:
    """The page of one run or of several, and where it lies. Raises `ConfigError`, and `DataError` where it cannot be."""
    from ltx2_train.errors import ConfigError
    from ltx2_train.evals.comparison import write_comparison
    from ltx2_train.evals.report import write_report

    if not 0 <= options.media_mb < math.inf:
        raise ConfigError(f"--media-mb {options.media_mb}: must be a number of megabytes, 0 or above")
    budget = round(options.media_mb * 1e6)
    if len(options.runs) == 1:
        return write_report(options.runs[0], options.out, media_bytes=budget)
    path = options.out or Path("comparison.html")
    settings = [settings_of(run) for run in options.runs]
    return write_comparison(options.runs, path, settings, media_bytes=budget)


def settings_of(run: Path) -> dict[str, str]:
    """What config.yaml of a run says, flat, by dotted names; nothing where there is none."""
    from omegaconf import OmegaConf

    from ltx2_train.evals.runrecord import CONFIG_NAME

    path = run / CONFIG_NAME
    values = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return {name: value for name, value in flat(values) if not name.startswith("defaults.")}


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names with dots and values as text, of all that is set: null and what is empty have no line."""
    if isinstance(values, dict | list) and values:
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif prefix and values not in (None, [], {}):
        yield prefix, str(values)


if __name__ == "__main__":
    sys.exit(main())
