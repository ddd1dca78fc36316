"""The model card of an export: what was trained, on what, how well it did, how to sample it, and samples of the run."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltx2_train.cli.provenance import EMBEDDED, PARTS

if TYPE_CHECKING:
    from ltx2_train.cli.export import Work
    from ltx2_train.cli.source import Source
    from ltx2_train.evals.runrecord import RunRecord
    from ltx2_train.model.export import Provenance

SAMPLES = "samples"  # folder beside the card
SHOWN_CLIPS = 4
LICENCE = (
    "weights derived from LTX weights carry the base's licence. Read it where the base came from, and name it here before "
    "you publish this file."
)
FROM_SCRATCH = (
    "These weights were trained from scratch: name the licence that you give them here before you publish this file."
)
BASE_FROM_SCRATCH = (
    "the base is no released file, but was exported from a run that began from scratch. Name the licence that you give "
    "these weights here before you publish this file."
)
BASE_UNKNOWN = (
    "nothing says that the base is a released file: the data were made by stand-ins. Name the licence of these weights here "
    "before you publish this file; what derives from LTX weights carries theirs."
)
FOLDED = "Alpha is folded in: strength 1 is as trained."
LAYOUTS = {
    "lora": f"A LoRA in the official key form. {FOLDED}",
    "lora-diffusers": f"A LoRA under diffusers' names. {FOLDED}",
    "merged": "The base with the LoRA added, in the base's own layout.",
    "full": "A whole model in the official layout.",
    "transformer": "Transformer and connectors in the official layout.",
    "diffusers": "Folders in the layout of diffusers.",
}
USES = {  # of what stands on a base
    "lora": "For ComfyUI and the reference pipelines.",
    "lora-diffusers": "For diffusers' `load_lora_weights`.",
    "merged": "Used as the base is.",
    "full": "A whole fine-tune: used as the base is.",
    "transformer": "The other components are those of the base.",
    "diffusers": "For `from_pretrained`; the other components are those of the base.",
}


def write_card(path: Path, work: "Work", files: Sequence[str]) -> Path:
    """Writes the card, and the newest samples of the run beside it; returns its path.

    It is titled after what was exported. Datasets are named by their folder's name, not by their place.

    Raises `DataError` when the run has no metrics.
    """
    from ltx2_train.evals.runrecord import read_run

    source, provenance, out = work.source, work.provenance, work.options.out
    run = read_run(source.directory)
    sections = [
        _front(provenance, source),
        f"# {out.name.removesuffix('.safetensors')}\n\n{_use(work.options.to, source)}\n\n"
        + "\n".join(f"- `{name}`" for name in files),
        "## Base and licence\n\n" + "\n".join(_base(work)),
        "## Training\n\n" + _table(_training(source)),
        "## Data\n\n" + "\n".join(_data(source)),
        *_heldout(run),
        "## Sampling\n\n" + "\n".join(_sampling(provenance)),
        *_samples(run, path.parent),
    ]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _front(provenance: "Provenance", source: "Source") -> str:
    """What model hubs read."""
    tags = ["ltx-2", "text-to-video", "text-to-audio", *(["lora"] if source.job.lora is not None else [])]
    lines = ["---", "license: other", "tags:", *(f"- {tag}" for tag in tags)]
    if provenance.trigger_word:
        lines.append(f"instance_prompt: {json.dumps(provenance.trigger_word)}")
    return "\n".join([*lines, "---"])


def _use(form: str, source: "Source") -> str:
    """What was written, and what loads it: what learned the stand-ins' latents goes with nothing that was released."""
    made = ", ".join(f"{part.replace('_', ' ')} {name}" for part, name in stand_ins(source).items())
    if made:
        return (
            f"{LAYOUTS[form]} For trying with `ltx2_train` alone: its data were made by embedded stand-ins ({made}), so it "
            "works neither with released weights nor in ComfyUI, the reference pipelines or diffusers."
        )
    if source.start is None:
        return f"{LAYOUTS[form]} Trained from scratch: it goes with the codecs and the text encoder that made its data."
    return f"{LAYOUTS[form]} {USES[form]}"


def stand_ins(source: "Source") -> dict[str, str]:
    """The embedded stand-ins that made the run's data, by part."""
    names = {part: source.provenance[part] for part in PARTS}
    return {part: name for part, name in names.items() if name.startswith(EMBEDDED)}


def _base(work: "Work") -> Iterator[str]:
    provenance, base = work.provenance, work.base
    if work.source.start is None or base is None:
        yield f"The architecture of LTX {provenance.base_generation}. {FROM_SCRATCH}"
        return
    licence = BASE_FROM_SCRATCH if base.from_scratch else BASE_UNKNOWN if stand_ins(work.source) else LICENCE
    told = "LTX" if licence is LICENCE else "architecture of LTX"
    yield f"- base: {provenance.base_name} ({told} {provenance.base_generation})"
    yield f"- fingerprint of the base: `{provenance.base_fingerprint}`"
    yield f"- licence: {licence}"


def _training(source: "Source") -> Iterator[tuple[str, object]]:
    """The settings that one asks for first."""
    job = source.job
    yield "steps", source.step
    yield "weights", "moving average" if source.weights == "ema" else "as trained"
    yield (
        "peak learning rate",
        f"{job.optim.lr:g} ({job.optim.schedule.value}, {job.optim.warmup_steps} steps of warm-up)",
    )
    yield "samples per step, at most", job.data.plan.max_samples * job.data.plan.micro_batches_per_step
    yield "precision", job.engine.precision.value
    yield "streams", ", ".join(str(stream.value) for stream in job.objective.streams)
    if job.lora is not None:
        alpha = job.lora.rank if job.lora.alpha is None else job.lora.alpha
        yield "LoRA rank, alpha", f"{job.lora.rank}, {alpha:g}"
        yield "LoRA targets", "<br>".join(f"`{target}`".replace("|", "\\|") for target in job.lora.targets)
    yield "seed", job.seed


def _data(source: "Source") -> Iterator[str]:
    from ltx2_train.data.datasets import open_dataset
    from ltx2_train.errors import DataError

    for dataset in source.job.data.datasets:
        name = Path(dataset.path).name
        try:
            yield f"- {name}: {len(open_dataset(dataset.path)):,} samples"
        except DataError:
            yield f"- {name}: no longer where it was trained from, so its samples are not counted here"
    for name in PARTS:
        yield f"- {name.replace('_', ' ')}: {source.provenance[name]}"


def _heldout(run: "RunRecord") -> Iterator[str]:
    """Losses of the first and of the last evaluation; nothing where there is none."""
    from ltx2_train.evals.heldout import MODALITIES
    from ltx2_train.evals.report import loss_text

    rows = []
    for entry in run.heldout[:1] + run.heldout[1:][-1:]:
        losses = entry.get("ema") or entry["raw"]
        rows.append((f"step {entry['step']}", *(loss_text(losses[m]["mean"]) for m in MODALITIES)))
    if rows:
        yield "## Held-out loss\n\n" + _table(rows, head=("", *MODALITIES))


def _sampling(provenance: "Provenance") -> Iterator[str]:
    profile = provenance.sampler_profile
    if provenance.trigger_word:
        yield f"- trigger word: {provenance.trigger_word}"
    yield f"- profile {profile['name']}: {profile['steps']} steps, schedule {profile['schedule']}"
    for stream in ("video", "audio"):
        yield f"- guidance of {stream}: " + ", ".join(
            f"{k} {v}" for k, v in profile[stream].items() if v not in ([], None)
        )
    for name in ("reference_downscale_factor", "reference_temporal_scale_factor"):
        if getattr(provenance, name) != 1:
            yield f"- {name.replace('_', ' ')}: {getattr(provenance, name)}"


def _samples(run: "RunRecord", directory: Path) -> Iterator[str]:
    """The first clips of the run's newest evaluation, copied beside the card; nothing where there is none."""
    if run.samples is None or run.samples_directory is None:
        return
    clips = [clip for clip in run.samples["clips"] if clip.get("sampled", {}).get("media")][:SHOWN_CLIPS]
    lines = [line for clip in clips for line in _clip(clip, run.samples_directory, directory / SAMPLES)]
    if lines:
        yield f"## Samples\n\nFrom held-out captions, at step {run.samples['step']}.\n\n" + "\n".join(lines)


def _clip(clip: dict[str, Any], source: Path, target: Path) -> Iterator[str]:
    target.mkdir(parents=True, exist_ok=True)
    names = [clip["sampled"][kind] for kind in ("media", "strip") if clip["sampled"].get(kind)]
    for name in names:
        shutil.copy2(source / name, target / name)
    yield f"- [{clip['caption']}]({SAMPLES}/{names[0]})"
    for name in names[1:]:
        yield f"\n  ![frames]({SAMPLES}/{name})"


def _table(rows: Iterable[Sequence[object]], head: Sequence[str] = ("setting", "value")) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
