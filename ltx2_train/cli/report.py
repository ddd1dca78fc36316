"""`ltx2-report`: one page that tells what a run did."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Write RUN/report.html from what a run directory holds: losses per modality and per noise level, held-out losses
before and after, throughput, and the newest samples as video with sound beside the real clips.

The page holds everything itself, can be mailed and opens without a network. It may be written while the run goes on."""
EPILOG = """\
examples:
  ltx2-report outputs/demo/run
  ltx2-report outputs/demo/run --out reports/tuesday.html"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-report", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, metavar="RUN", help="a run directory, as ltx2-train wrote it")
    p.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (RUN/report.html)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that names the next action."""
    options = parser().parse_args(argv)
    from ltx2_train.errors import Ltx2Error
    from ltx2_train.evals.report import write_report

    try:
        path = write_report(options.run, options.out)
    except Ltx2Error as error:
        print(f"ltx2-report: {error}", file=sys.stderr)
        return 2
    print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
