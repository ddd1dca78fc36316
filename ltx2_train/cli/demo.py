"""`ltx2-demo`: the whole story on small synthetic clips, as the commands that a user would type."""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = "ltx2-demo"
STATE_NAME = "demo.json"
DESCRIPTION = """\
From nothing to a sampled clip with sound, in about eight minutes on two CPU cores:
write small clips of a bouncing ball -> pack -> encode -> measure held-out loss -> train the demo model ->
measure it again -> sample held-out captions, measure how well sound meets picture -> report.

Every step is a command of its own, printed as you would type it. Interrupted, the same command goes on where it was."""
EPILOG = """\
examples:
  ltx2-demo                                      the demo as `make demo` runs it
  ltx2-demo --out outputs/small --clips 256 --steps 100   a quick look; too few steps for sound to meet picture
"""
SIZE = {"width": 64, "height": 64, "frames": 41}


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of the story. `module` and `arguments` are what runs; `title` says why."""

    name: str
    title: str
    module: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        return shlex.join(["python", "-m", self.module, *self.arguments])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=Path("outputs/demo"), help="where everything goes (outputs/demo)")
    p.add_argument("--clips", type=int, default=2048, help="synthetic clips to write (2048)")
    p.add_argument("--steps", type=int, default=1150, help="training steps (1150)")
    p.add_argument("--samples", type=int, default=64, help="held-out captions to sample; four are shown (64)")
    p.add_argument("--seed", type=int, default=0, help="another seed is another world and another model (0)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 when the story is told, that of the failing command otherwise."""
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return tell(options)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.")
        return 130


def tell(options: argparse.Namespace) -> int:
    """Runs what is not done yet, one stage after another."""
    state_path = options.out / STATE_NAME
    settings = {name: getattr(options, name) for name in ("clips", "steps", "samples", "seed")}
    state = _load_state(state_path, settings)
    if state is None:
        return 2
    stages = story(options)
    print(f"From clips to a sampled clip with sound. Everything goes into {options.out}.")
    for number, stage in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages)}] {stage.title}\n  $ {stage.command}", flush=True)
        if stage.name in state["done"]:
            print(f"  already done, in {state['done'][stage.name]:.0f} s")
            continue
        begin = time.perf_counter()
        code = run(stage)
        if code:
            print(f"\n{PROGRAM}: this command ended with {code}; what it said stands above. ", file=sys.stderr, end="")
            print("When that is mended, the same command goes on from here.", file=sys.stderr)
            return code
        state["done"][stage.name] = time.perf_counter() - begin
        _save_state(state_path, state)
        print(f"  done in {state['done'][stage.name]:.0f} s", flush=True)
    print("\n" + "\n".join(summary(options.out, state)))
    return 0


def story(options: argparse.Namespace) -> list[Stage]:
    """All stages, in order."""
    out, seed = options.out, str(options.seed)
    world, raw, latents, run_dir = out / "world", out / "raw", out / "latents", out / "run"
    bucket = "{width}x{height}".format(**SIZE)
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    heldout = max(1, min(256, options.clips // 8))
    return [
        Stage(
            "synth",
            f"Write {options.clips} small clips: a ball falls and bounces, every impact clicks",
            "data_prep.synth",
            ("--out", str(world), f"--clips={options.clips}", f"--seed={seed}", *size),
        ),
        Stage(
            "pack",
            "Pack the files and their captions into raw shards",
            "data_prep.pack",
            (str(world / "metadata.jsonl"), "--out", str(raw)),
        ),
        Stage(
            "encode",
            f"Encode them into latents; {heldout} clips are held out",
            "data_prep.encode",
            (str(raw), "--out", str(latents), f"--buckets={bucket}x{SIZE['frames']};{bucket}x1", "--model=demo")
            + (f"--holdout-count={heldout}",),
        ),
        Stage(
            "train",
            f"Train the demo model for {options.steps} steps, from scratch; held-out loss before and after",
            "ltx2_train.cli.train",
            ("experiment=demo", f"seed={seed}", f"train.max_steps={options.steps}", f"train.run_dir={run_dir}")
            + (f"data.datasets.0.path={latents / 'train'}", f"evaluation.datasets=[{latents / 'heldout'}]")
            + ("evaluation.heldout.clips=64", "evaluation.samples=null"),
        ),
        Stage(
            "sample",
            f"Sample {options.samples} held-out captions and measure how well sound meets picture",
            "ltx2_train.cli.evaluate",
            (str(run_dir), f"--samples={options.samples}", "--shown=4"),
        ),
        Stage("report", "Tell it on one page", "ltx2_train.cli.report", (str(run_dir),)),
    ]


def run(stage: Stage) -> int:
    """The exit status of a stage's process. If this process is stopped, so is that one, and its end is waited for."""
    with subprocess.Popen([sys.executable, "-m", stage.module, *stage.arguments]) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()  # training saves first; leaving the context waits for no more than a moment
            raise


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _load_state(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is done already; None, after a message, if that was with other settings."""
    if not path.exists():
        return {"settings": settings, "done": {}}
    state = json.loads(path.read_text())
    if state["settings"] == settings:
        return state
    before = " ".join(f"--{name} {value}" for name, value in state["settings"].items())
    print(
        f"{PROGRAM}: {path.parent} holds a demo with {before}. Give the same options to go on with it, "
        "or another --out for a new one",
        file=sys.stderr,
    )
    return None


def _save_state(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(state, indent=1))
    partial.replace(path)


def summary(out: Path, state: dict[str, Any]) -> list[str]:
    """What came of it, and where it lies."""
    from ltx2_train.evals.report import duration, headline
    from ltx2_train.evals.runrecord import read_run

    run_dir = out / "run"
    record = read_run(run_dir)
    lines = [f"The demo is finished: {duration(sum(state['done'].values()))} in all.", ""]
    rows = [(tile["label"], f"{tile['value']}  {tile.get('note', '')}") for tile in headline(record)]
    rows += [("report", str(run_dir / "report.html")), ("sampled clips", f"{record.samples_directory}/*.mp4")]
    rows += [("the run", str(run_dir)), ("latents", str(out / "latents")), ("media files", str(out / "world"))]
    lines += [f"  {name:<32} {text}" for name, text in rows]
    prompt = record.samples["clips"][0]["caption"] if record.samples else ""
    return [*lines, "", "Sample your own: " + shlex.join([typed("ltx2-sample"), str(run_dir), "--prompt", prompt])]


def typed(name: str) -> str:
    """How one types a program here: by its name, or where the virtual environment is not active, by its path."""
    return name if shutil.which(name) else str(Path(sys.executable).with_name(name))


if __name__ == "__main__":
    sys.exit(main())
