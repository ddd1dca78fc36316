"""The click falls on the impact: a small model trained from scratch until its own clips are in sync.

python -m tests.proofs.bounce [--out outputs/bounce] [--docs docs] [--clips 6400] [--steps 4000] [--samples 128]

Writes clips of a bouncing ball whose impacts no caption tells the time of, trains `experiment=bounce` on them, and beside it
the same without attention between the streams. Four of the world's captions (a colour on a background) are held out with all
their clips; for them both are sampled with three seeds: sound and picture together, the picture for real sound (a2v), the
sound for a real picture (v2a), and together at rising modality guidance. Nothing else is guided. Impacts are upward turns of
the tracked ball, clicks are peaks of onset strength; F1 counts matches within 50 ms, one to one.

Every stage that is done stays done: interrupted, the same command goes on; with other options it is refused. Two processes
of one thread each run at a time.
The last stage writes bounce.json, bounce.md and its pictures into --docs; nothing in them comes from anywhere else.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ltx2_train.diffusion.generate import Request, generate
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.evals.sync import impacts, match, waveform_onsets
from ltx2_train.record import Sample, TextFeatures
from tests.proofs import bounce_page

if TYPE_CHECKING:
    from ltx2_train.cli.runs import Trained
    from ltx2_train.data.datasets import LatentDataset

SIZE = {"width": 64, "height": 64, "frames": 81, "fps": 50}
WIDTHS = ("--video-text-width=160", "--audio-text-width=128")  # of conf/model/bounce.yaml
HELD_OUT_CAPTIONS = 4
TOLERANCE = 0.05  # s
WIDE_TOLERANCE = 0.08  # s, reported beside it
SEEDS = (0, 1, 2)  # of the noise that clips are sampled from
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)  # of modality guidance
WITHOUT_EXCHANGE = "+model.overrides.use_audio_video_cross_attention=false"
RESAMPLINGS = 2000
LOSS_POINTS = 100  # of a training, in bounce.json
STRIPS = 2
BATCH_SIZE = 32
PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Draw:
    """One set of sampled clips: `run` names the model, `mode` what is given to it."""

    run: str  # joint, no_av_attention; real: held-out clips through the codec
    mode: str  # joint, a2v (the sound is given), v2a (the picture is given)
    seed: int
    scale: float = 1.0  # of modality guidance

    @property
    def name(self) -> str:
        return f"{self.run}-{self.mode}-guidance{self.scale:g}-seed{self.seed}"


RUNS = {"joint": (), "no_av_attention": (WITHOUT_EXCHANGE,)}
GROUPS = {
    "joint": [Draw("joint", "joint", seed) for seed in SEEDS],
    "no_av_attention": [Draw("no_av_attention", "joint", seed) for seed in SEEDS],
    "a2v": [Draw("joint", "a2v", seed) for seed in SEEDS],
    "v2a": [Draw("joint", "v2a", seed) for seed in SEEDS],
    "real": [Draw("real", "joint", 0)],
}
CURVE = [Draw("joint", "joint", seed, scale) for scale in SCALES for seed in SEEDS]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 when every stage is done, that of the failing command otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/bounce"), help="data, runs and samples (outputs/bounce)"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the figures go (docs)")
    parser.add_argument("--clips", type=int, default=6400, help="clips to write, held-out ones included (6400)")
    parser.add_argument("--steps", type=int, default=4000, help="of each training (4000)")
    parser.add_argument("--samples", type=int, default=128, help="held-out clips that sets are like (128)")
    options = parser.parse_args(argv)
    if options.samples < 2:
        parser.error("--samples: need at least 2, so that sounds can be exchanged")
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by every process that is started here
    for stage in data_stages(options):
        if code := run_side_by_side(options.out, stage):
            return code
    check_held_out(options)
    if code := run_side_by_side(options.out, train_stages(options)):
        return code
    measure_all(options)
    write_figures(options)
    return 0


# -- data and training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Command:
    """A program and what is done when its file `name`.json lies among the finished ones."""

    name: str
    module: str
    arguments: tuple[str, ...]


def data_stages(options: argparse.Namespace) -> list[list[Command]]:
    world, raw = options.out / "world", options.out / "raw"
    size = [f"--{name}={value}" for name, value in SIZE.items()]
    bucket = "{width}x{height}x{frames}".format(**SIZE)
    synth = ("--out", str(world), f"--clips={options.clips}", *size, "--silent-fraction=0", "--image-fraction=0")
    held_out = f"--holdout-count={HELD_OUT_CAPTIONS}"
    encode = (str(raw), "--out", str(options.out / "latents"), f"--buckets={bucket}", *WIDTHS)
    return [
        [Command("synth", "data_prep.synth", synth)],
        [Command("pack", "data_prep.pack", (str(world / "metadata.jsonl"), "--out", str(raw)))],
        [Command("encode", "data_prep.encode", (*encode, "--holdout-by=caption", held_out))],
    ]


def train_stages(options: argparse.Namespace) -> list[Command]:
    """The model and the one without exchange: same data, seed and steps."""
    latents = options.out / "latents"
    common = ("experiment=bounce", f"train.max_steps={options.steps}", f"data.datasets.0.path={latents / 'train'}")
    common += (f"evaluation.datasets=[{latents / 'heldout'}]", "sinks.wandb=false")
    return [
        Command(name, "ltx2_train.cli.train", (*common, f"train.run_dir={options.out / name}", *more))
        for name, more in RUNS.items()
    ]


def check_held_out(options: argparse.Namespace) -> None:
    """Ends the program where training sees a held-out caption, or fewer clips are held out than are to be sampled."""
    seen, unseen = (captions(options.out, split) for split in ("train", "heldout"))
    if both := set(seen) & set(unseen):
        raise SystemExit(f"{options.out / 'latents'}: {min(both)!r} is in both splits. Remove {options.out}")
    if len(unseen) < options.samples:
        raise SystemExit(
            f"--samples {options.samples}: only {len(unseen)} clips are held out. Ask for fewer, or more --clips"
        )


def captions(out: Path, split: str) -> list[str]:
    """Of all clips of a split."""
    from ltx2_train.data.datasets import open_dataset

    dataset = open_dataset(str(out / "latents" / split))
    return [dataset.read(i).caption for i in range(len(dataset))]


def run_side_by_side(out: Path, commands: Sequence[Command]) -> int:
    """Runs what is not done yet, all at once; the first exit status that is not 0."""
    begin, processes = time.perf_counter(), {}
    for command in commands:
        if not is_done(out, command):
            print("$ " + shlex.join(["python", "-m", command.module, *command.arguments]), flush=True)
            processes[command] = subprocess.Popen([sys.executable, "-m", command.module, *command.arguments])
    running = list(processes)
    try:
        while running:
            time.sleep(0.2)
            ended = [command for command in running if processes[command].poll() is not None]
            for command in ended:
                running.remove(command)
                if processes[command].returncode == 0:
                    done = {"arguments": command.arguments, "commit": commit()}
                    write_json(done_path(out, command.name), done | {"seconds": round(time.perf_counter() - begin)})
    finally:
        for process in processes.values():
            process.terminate()
    return next(filter(None, (process.returncode for process in processes.values())), 0)


def done_path(out: Path, stage: str) -> Path:
    return out / "done" / f"{stage}.json"


def is_done(out: Path, command: Command) -> bool:
    """Whether a stage is done. Ends the program where it was done with other options."""
    if not (path := done_path(out, command.name)).exists():
        return False
    done = json.loads(path.read_text())["arguments"]
    if done != list(command.arguments):
        differ = sorted({*done} ^ {*command.arguments})
        raise SystemExit(f"{path}: done with other options ({', '.join(differ)}). Give another --out, or remove {out}")
    return True


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


# -- sampling ----------------------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> None:
    """Samples every set that is not there yet, two at a time."""
    draws = {draw.name: draw for group in (*GROUPS.values(), CURVE) for draw in group}
    models = {run: model_digest(options.out, run) for run in RUNS}
    missing = [draw for draw in draws.values() if not is_measured(options, draw, models[model_of(draw)])]
    if not missing:
        return
    print(f"{len(missing)} sets of {options.samples} clips to sample", flush=True)
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for line in pool.map(measure, [options.out] * len(missing), missing, [options.samples] * len(missing)):
            print(line, flush=True)


def set_path(out: Path, draw: Draw) -> Path:
    return out / "sets" / f"{draw.name}.json"


def model_of(draw: Draw) -> str:
    """The run whose codecs, and but for real clips whose weights, make a set."""
    return "joint" if draw.run == "real" else draw.run


def model_digest(out: Path, run: str) -> str:
    """Of the checkpoint that is sampled, and so of every tensor in it."""
    from ltx2_train.cli.runs import find_checkpoint
    from ltx2_train.train.checkpoint import MANIFEST

    return json.loads((find_checkpoint(out / run) / MANIFEST).read_text())["digest"]


def is_measured(options: argparse.Namespace, draw: Draw, model: str) -> bool:
    """Whether the set is there, made by this model and as large."""
    if not (path := set_path(options.out, draw)).exists():
        return False
    found = json.loads(path.read_text())
    return found["model"] == model and len(found["clips"]) == options.samples


def measure(out: Path, draw: Draw, samples: int) -> str:
    """Samples one set and writes the times of its events; a line that says so."""
    from ltx2_train.cli.runs import load_trained
    from ltx2_train.data.datasets import open_dataset

    torch.set_num_threads(1)
    begin = time.perf_counter()
    dataset = open_dataset(str(out / "latents" / "heldout"))
    places = [i * len(dataset) // samples for i in range(samples)]
    trained = load_trained(out / model_of(draw))
    clips = []
    for start in range(0, samples, BATCH_SIZE):
        references = [dataset.read(i) for i in places[start : start + BATCH_SIZE]]
        video, audio = latents_of(trained, dataset, references, draw, first_seed=draw.seed * samples + start)
        shown = range(max(0, min(STRIPS, samples) - start)) if draw.seed == 0 and draw.scale == 1 else range(0)
        clips += list(events(trained, references, video, audio, out / "sets" / draw.name, shown))
    content = {**asdict(draw), "step": trained.step, "profile": profile_of(trained, draw).to_dict()}
    content |= {"model": model_digest(out, model_of(draw)), "commit": commit(), "clips": clips}
    write_json(set_path(out, draw), content)
    counts = ", ".join(f"{sum(len(clip[name]) for clip in clips)} {name}" for name in ("impacts", "onsets"))
    return f"{draw.name}: F1 {f1(counts_of(clips)):.3f}, {counts}, {time.perf_counter() - begin:.0f} s"


def latents_of(
    trained: "Trained", dataset: "LatentDataset", references: Sequence[Sample], draw: Draw, first_seed: int
) -> tuple[Tensor, Tensor]:
    """Latents (B, 128, F, H, W) and (B, 8, T, 16) of clips like the references."""
    if draw.run == "real":
        return torch.stack([need(r.video) for r in references]), torch.stack([need(r.audio) for r in references])
    negative = dataset.known_null_text("sampling")
    requests = [request(r, negative, draw.mode, first_seed + i) for i, r in enumerate(references)]
    generated = generate(trained.model, requests, profile_of(trained, draw), keyframe_marker=trained.keyframe_marker)
    return need(generated.video), need(generated.audio)


def profile_of(trained: "Trained", draw: Draw) -> SamplerProfile:
    """The steps and schedule stored with the run, guided by the other stream alone: 1 is not at all."""
    return replace(trained.profile, **{name: GuidanceConfig(modality=draw.scale) for name in ("video", "audio")})


def request(reference: Sample, negative: TextFeatures, mode: str, seed: int) -> Request:
    """A clip for the reference's caption; what `mode` gives is the reference's own."""
    given = {"a2v": {"given_audio": need(reference.audio)}, "v2a": {"given_video": need(reference.video)}, "joint": {}}
    return Request(
        text=reference.text,
        negative=negative,
        **{name: SIZE[name] for name in ("frames", "height", "width")},
        fps=reference.fps,
        seed=seed,
        **given[mode],
    )


def need(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the world's clips have picture and sound"
    return tensor.float()


@torch.no_grad()
def events(
    trained: "Trained", references: Sequence[Sample], video: Tensor, audio: Tensor, pictures: Path, shown: range
) -> Iterable[dict[str, Any]]:
    """Key, caption, impacts and onsets (s) of each clip, decoded. Writes those that are `shown`, as picture and film."""
    codecs = trained.components.codecs()
    for i, reference in enumerate(references):
        film = codecs.video.decode(video[i : i + 1])[0].clamp(-1, 1)
        waveform = codecs.audio.decode(audio[i : i + 1])[0].clamp(-1, 1)
        seen, heard = impacts(film, reference.fps), waveform_onsets(waveform, codecs.audio.sample_rate)
        if i in shown:
            bounce_page.write_strip(pictures / f"{i}.png", film, waveform, reference.fps, seen, heard)
            bounce_page.write_film(pictures / f"{i}.mp4", film, waveform, reference.fps, codecs.audio.sample_rate)
        times = {"impacts": [round(t, 4) for t in seen], "onsets": [round(t, 4) for t in heard]}
        yield {"key": reference.key, "caption": reference.caption, **times}


# -- figures -----------------------------------------------------------------------------------------------------------


def counts_of(clips: Iterable[dict[str, Any]], tolerance: float = TOLERANCE) -> np.ndarray:
    """(clips, 2): events that are matched, and all events."""
    pairs = [(clip["impacts"], clip["onsets"]) for clip in clips]
    return np.array([(2 * len(match(a, b, tolerance)), len(a) + len(b)) for a, b in pairs], dtype=np.float64)


def f1(counts: np.ndarray) -> float:
    matched, events = counts.reshape(-1, 2).sum(0)
    return float(matched / events) if events else 0.0


def interval(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return {"low": round(float(low), 4), "high": round(float(high), 4)}


def estimate(sets: Sequence[list[dict[str, Any]]], tolerance: float = TOLERANCE) -> dict[str, float]:
    """F1 over sets like the same held-out clips; 95 % interval by drawing these anew, each with its sample in every set."""
    counts = np.stack([counts_of(clips, tolerance) for clips in sets])  # (sets, held-out clips, 2)
    draws = np.random.default_rng(0).integers(counts.shape[1], size=(RESAMPLINGS, counts.shape[1]))
    return {"mean": round(f1(counts), 4), **interval([f1(counts[:, draw]) for draw in draws])}


def shuffled(sets: Sequence[list[dict[str, Any]]], tolerance: float = TOLERANCE) -> dict[str, float]:
    """F1 of the same pictures with the sounds of other clips of their set: what clips that know nothing of each other have.

    The interval holds 95 % of the shuffles, so it is where the F1 of unrelated streams lies.
    """
    tables = [np.array([[_pair(a, b, tolerance) for b in clips] for a in clips]) for clips in sets]
    rng, values = np.random.default_rng(0), []
    for _ in range(RESAMPLINGS):
        pairs = [table[np.arange(len(table)), derangement(len(table), rng)] for table in tables]
        values.append(f1(np.concatenate(pairs)))
    return {"mean": round(float(np.mean(values)), 4), **interval(values)}


def _pair(seen: dict[str, Any], heard: dict[str, Any], tolerance: float) -> tuple[int, int]:
    a, b = seen["impacts"], heard["onsets"]
    return 2 * len(match(a, b, tolerance)), len(a) + len(b)


def derangement(size: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that leaves nothing in its place: of more than one."""
    assert size > 1, "one clip has no other's sound"
    while True:
        order = rng.permutation(size)
        if not (order == np.arange(size)).any():
            return order


def tally(sets: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """How many events there are, and how far matched ones lie apart."""
    clips = [clip for one in sets for clip in one]
    apart = [d for clip in clips for d in match(clip["impacts"], clip["onsets"], TOLERANCE)]
    return {
        "clips": len(clips),
        "impacts": sum(len(clip["impacts"]) for clip in clips),
        "onsets": sum(len(clip["onsets"]) for clip in clips),
        "matched": len(apart),
        "mean_error_ms": round(1000 * float(np.mean(np.abs(apart))), 1) if apart else None,
        "offset_ms": round(1000 * float(np.median(apart)), 1) if apart else None,
    }


def read_set(out: Path, draw: Draw) -> list[dict[str, Any]]:
    return json.loads(set_path(out, draw).read_text())["clips"]


def minutes(out: Path, stage: str) -> float:
    """From the start of a stage to its end; of one that was interrupted, of its last start."""
    return round(json.loads(done_path(out, stage).read_text())["seconds"] / 60, 1)


def training_of(out: Path, run: str) -> dict[str, Any]:
    """Steps, the minutes that they took alone, and the course of the losses."""
    lines = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "event" not in line]
    heldout = [line for line in lines if line.get("event") == "heldout"]
    steps = [row["step"] for row in rows[:-1]]
    return {
        "steps": rows[-1]["step"],
        "minutes": round(
            sum(r["step_seconds"] * (r["step"] - before) for before, r in zip([0, *steps], rows, strict=True)) / 60, 1
        ),
        "losses": [{"step": r["step"], **rounded(r)} for r in rows[:: max(1, len(rows) // LOSS_POINTS)]],
        "heldout": [{"step": line["step"], **rounded(line)} for line in heldout],
    }


def rounded(row: dict[str, Any]) -> dict[str, float | None]:
    """The losses of a line of metrics.jsonl."""
    return {name: None if (x := row[f"loss_{name}"]) is None else round(x, 4) for name in ("video", "audio")}


def write_figures(options: argparse.Namespace) -> None:
    """bounce.json, the page and its pictures, from the sets of events alone."""
    sets = {name: [read_set(options.out, draw) for draw in draws] for name, draws in GROUPS.items()}
    model = {name: of for name, of in sets.items() if name != "real"}
    curve = []
    for scale in SCALES:
        at = [read_set(options.out, draw) for draw in CURVE if draw.scale == scale]
        curve.append({"scale": scale, **estimate(at), "chance": shuffled(at)["mean"], **tally(at)})
    figures = {
        "num_clips": options.samples,
        "seeds": len(SEEDS),
        "captions": {split: dict(Counter(captions(options.out, split))) for split in ("train", "heldout")},
        "tolerance_ms": round(1000 * TOLERANCE),
        "onset_f1": {name: estimate(of) for name, of in model.items()} | {"chance": shuffled(sets["joint"])},
        "onset_f1_80_ms": {name: estimate(of, WIDE_TOLERANCE) for name, of in model.items()}
        | {"chance": shuffled(sets["joint"], WIDE_TOLERANCE)},
        "chance_of": {name: shuffled(of) for name, of in sets.items()},
        "real": estimate(sets["real"]),
        "events": {name: tally(of) for name, of in sets.items()},
        "modality_guidance": curve,
        "training": {run: training_of(options.out, run) for run in RUNS},
        "minutes": {p.stem: minutes(options.out, p.stem) for p in sorted((options.out / "done").glob("*.json"))},
        "command": shlex.join(["python", "-m", "tests.proofs.bounce", f"--clips={options.clips}"])
        + f" --steps={options.steps} --samples={options.samples}",
        "commits": commits(options.out),
    }
    assert all(math.isfinite(e["mean"]) for e in figures["onset_f1"].values())
    strips = {
        name: [options.out / "sets" / draws[0].name / f"{i}.png" for i in range(STRIPS)]
        for name, draws in GROUPS.items()
    }
    bounce_page.write(options.docs, figures, strips)
    write_json(options.docs / "bounce.json", figures)
    print(json.dumps(figures["onset_f1"], indent=1))


def commits(out: Path) -> list[str]:
    """Those at which something was made: more than one where a proof was interrupted by a change."""
    made = [*(out / "done").glob("*.json"), *(out / "sets").glob("*.json")]
    return sorted({json.loads(path.read_text())["commit"] for path in made})


def commit() -> str:
    """The commit of the working tree."""
    said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # takes what was started along
    sys.exit(main())
