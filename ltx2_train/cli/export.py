"""`ltx2-export`: what a run trained, in a form that loads elsewhere."""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ltx2_train.cli.source import Source
    from ltx2_train.model.export import Base, Coverage, Provenance
    from ltx2_train.model.lora_file import Adapter
    from ltx2_train.weightfile import Stored

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Write what a run trained into a form that other programs load: the newest complete checkpoint, its moving average where it
has one. Hashes are verified first, tensors pass through one at a time, and what lies at --out is complete or not there.

  lora            the adapters, for ComfyUI and the reference pipelines; alpha / rank is folded into B
  lora-diffusers  the adapters under diffusers' names
  merged          the base with the adapters added; everything else in it is copied byte for byte
  full            a full fine-tune as one file for the reference pipelines: transformer, connectors, and the base's VAEs,
                  vocoder and text projections beside them; without a base the transformer and connectors alone
  transformer     transformer and connectors alone, as 2.5 is published (of a LoRA run: with the adapters added)
  diffusers       a folder with transformer/, and connectors/ where the base has text projections

Beside it OUT.report.json says, for video, audio and the exchange between them, what was adapted and by how much."""
EPILOG = """\
examples:
  ltx2-export outputs/my_lora --to lora --out my_lora.safetensors --trigger "red ball"
  ltx2-export outputs/my_lora --to merged --base ltx-2.3.safetensors --out merged.safetensors
  ltx2-export outputs/tuned --to full --out tuned.safetensors --card
  ltx2-export outputs/tuned/checkpoints/step-00001000 --to diffusers --weights raw --out tuned_diffusers"""
LORA_FORMS = ("lora", "lora-diffusers")
FORMS = (*LORA_FORMS, "merged", "full", "transformer", "diffusers")
GB = 1_000_000_000
DIFFUSERS_SHARD_GB = 10.0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "ltx2-export", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, metavar="RUN", help="run directory, or one checkpoint of it")
    p.add_argument("--to", choices=FORMS, required=True, help="the form, see above")
    p.add_argument("--out", type=Path, required=True, metavar="PATH", help="NAME.safetensors; a folder for diffusers")
    p.add_argument("--base", type=Path, metavar="PATH", help="the released weights the run started from (as it says)")
    p.add_argument(
        "--weights", choices=("ema", "raw"), help="moving average or trained weights (ema where there is one)"
    )
    p.add_argument(
        "--dtype", choices=("bf16", "fp32"), help="of matrices (as in the base, else bf16); tables stay fp32"
    )
    p.add_argument("--trigger", metavar="TEXT", help="trigger word, for the header")
    p.add_argument("--max-shard-gb", type=float, metavar="X", help="cut above this size (diffusers 10, others never)")
    p.add_argument("--reference-downscale", type=int, default=1, metavar="N", help="of a reference's pixels (1)")
    p.add_argument("--reference-temporal", type=int, default=1, metavar="N", help="of a reference's frames (1)")
    p.add_argument("--card", action="store_true", help="also write README.md, a model card with samples of the run")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that names the next action."""
    options = parser().parse_args(argv)
    from ltx2_train.errors import Ltx2Error

    try:
        for line in export(options):
            print(line, flush=True)
    except Ltx2Error as error:
        print(f"ltx2-export: {error}", file=sys.stderr)
        return 2
    return 0


def export(options: argparse.Namespace) -> Iterable[str]:
    """Writes the form that is asked for; the lines to print."""
    from ltx2_train.cli.source import open_source

    _check_place(options)
    _check_free([options.out, _report_path(options), *([_card_path(options)] if options.card else [])])
    source = open_source(options.run, options.weights, options.base)
    _check_form(options.to, source)
    base = open_base(options.base, source)
    if options.card:
        _check_card(source)
    yield f"step {source.step}, {source.weights} weights, base: {'none' if base is None else base.path}"
    yield from _remarks(options, source, base)
    work = Work.of(options, source, base)
    files = work.write()
    yield from work.coverage.lines()
    report = _write_report(work, files)
    yield from (f"{file}  ({file.stat().st_size / 1e6:.1f} MB)" for file in files)
    yield str(report)
    if options.card:
        from ltx2_train.cli.card import write_card

        yield str(write_card(_card_path(options), work, [file.name for file in files]))


# --- what a run holds ---


def open_base(path: Path | None, source: "Source") -> "Base | None":
    """The base of an export: `path`, or what the run started from. Raises `CheckpointError` when it is not the run's."""
    from ltx2_train.errors import CheckpointError
    from ltx2_train.model.build import transformer_config
    from ltx2_train.model.export import Base

    path = path or (None if source.start is None else Path(source.start))
    if path is None:
        return None
    base = Base(path)
    if base.config != transformer_config(source.job.model):
        raise CheckpointError(f"{path}: of another architecture than the run ({source.job.model.name}). Give its base")
    if source.start is None and source.job.lora is not None:
        raise CheckpointError(
            f"{path}: the run's adapters stand beside weights from scratch, not beside these. Drop --base"
        )
    stated = _stated_fingerprint(source, path)
    if stated is not None and stated != base.fingerprint:
        raise CheckpointError(
            f"{path}: not what the run started from (fingerprint {base.fingerprint[:12]}, the run's is {stated[:12]}). "
            "Give the file it started from"
        )
    return base


def _stated_fingerprint(source: "Source", path: Path) -> str | None:
    """Of the weights that the run started from: as it noted it, else of the file it names, where that still is."""
    from ltx2_train.model.export import Base

    if source.provenance.get("base") is not None:
        return str(source.provenance["base"])
    if source.start is None or not Path(source.start).exists() or path.samefile(source.start):
        return None
    return Base(Path(source.start)).fingerprint


# --- from there to files ---


@dataclass(frozen=True, slots=True)
class Work:
    """One export: everything that its forms are made of."""

    options: argparse.Namespace
    source: "Source"
    model: "nn.Module"
    base: "Base | None"
    provenance: "Provenance"
    coverage: "Coverage"

    @classmethod
    def of(cls, options: argparse.Namespace, source: "Source", base: "Base | None") -> "Work":
        from ltx2_train.model.export import Coverage
        from ltx2_train.model.lora import linear_weights

        model = source.model()
        coverage = Coverage(linear_weights(model))
        return cls(options, source, model, base, _provenance(options, source, base, model), coverage)

    @property
    def dtype(self) -> "torch.dtype | None":
        import torch

        return {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[self.options.dtype]

    def write(self) -> list[Path]:
        """The files of the form that is asked for."""
        import torch

        from ltx2_train.model.lora_file import LoraForm, write_lora

        adapters, metadata = self.adapters(), self.provenance.metadata()
        self.coverage.add_adapters(adapters)
        if self.options.to in LORA_FORMS:
            form = LoraForm.diffusers if self.options.to == "lora-diffusers" else LoraForm.official
            dtype = self.dtype or torch.bfloat16
            return [write_lora(self.options.out, adapters, metadata, form=form, dtype=dtype)]
        return self._write_model(self.tensors(adapters), metadata)

    def _write_model(self, tensors: "dict[str, Stored]", metadata: dict[str, str]) -> list[Path]:
        from ltx2_train.model.export import official_layout, write_diffusers
        from ltx2_train.model.lora import config_of
        from ltx2_train.weightfile import index_path, planned_files, write_weights

        config, out, gigabytes = config_of(self.model), self.options.out, self.options.max_shard_gb
        if self.options.to == "diffusers":
            projections = {} if self.base is None else self.base.projections
            if not projections:
                _check_connectors(self.model, self.source)
            max_bytes = int((gigabytes or DIFFUSERS_SHARD_GB) * GB)
            return write_diffusers(out, config, tensors, projections, metadata, max_bytes=max_bytes)
        with_siblings = self.options.to != "transformer"
        keys, header = official_layout(config, tensors, self.base, with_siblings=with_siblings)
        limit = int(gigabytes * GB) if gigabytes else None
        _check_free([*planned_files(out, keys, limit), index_path(out)])
        return write_weights(out, keys, header | metadata, max_bytes=limit)

    def adapters(self) -> "dict[str, Adapter]":
        """The run's adapters by module; empty for a full fine-tune."""
        from ltx2_train.model.lora import trained_adapters

        lora = self.source.job.lora
        return {} if lora is None else trained_adapters(self.source.tensors(adapters=True), lora.scale)

    def tensors(self, adapters: "dict[str, Adapter]") -> "dict[str, Stored]":
        """Transformer and connectors as they are written, by official names: what was trained from the checkpoint, what was
        not from the base where the run started from one, watched for what changed."""
        from ltx2_train.model.export import adapted, cast, export_dtype

        like = {} if self.base is None else self.base.tensors
        before = {} if self.source.start is None else like
        written: dict[str, Stored] = {}
        for name, tensor in adapted(self._current(before), adapters).items():
            new = cast(tensor, export_dtype(name, like.get(name), self.dtype))
            written[name] = self.coverage.watched(name, before[name], new) if name in before else new
        return written

    def _current(self, before: "Mapping[str, Stored]") -> "dict[str, Stored]":
        """The weights without adapters, those of the checkpoint in its order."""
        from ltx2_train.model.export import InOrder
        from ltx2_train.model.lora import official_name

        own = {name: p for name, p in self.model.named_parameters() if ".lora_" not in name}
        own = dict(sorted(own.items(), key=lambda item: not item[1].requires_grad))  # the order in which they come
        passing = InOrder(self.source.tensors(adapters=False))
        names = {name: official_name(name) for name in own}
        trained = {
            names[name]: passing.stored(name, parameter.shape)
            for name, parameter in own.items()
            if parameter.requires_grad or names[name] not in before
        }
        kept = {name: tensor for name, tensor in before.items() if name not in trained}
        return trained | kept


def _provenance(options: argparse.Namespace, source: "Source", base: "Base | None", model: "nn.Module") -> "Provenance":
    from ltx2_train.cli.runs import data_size
    from ltx2_train.data.datasets import PROVENANCE
    from ltx2_train.model.build import context_tokens
    from ltx2_train.model.export import Provenance
    from ltx2_train.model.generation import generation_of
    from ltx2_train.model.lora import config_of

    try:
        size = data_size(source.job)
    except Exception as error:  # whatever a place that may be far away raises
        size = {}
        logger.warning("the file will not say the size of its training clips; who samples it has to: %s", error)
    started = base if source.start is not None else None
    return Provenance(
        step=source.step,
        weights=source.weights,
        base_generation=generation_of(config_of(model)),
        base_name=None if started is None else started.path.name,
        base_fingerprint=None if started is None else started.fingerprint,
        trigger_word=options.trigger,
        reference_downscale_factor=options.reference_downscale,
        reference_temporal_scale_factor=options.reference_temporal,
        sampler_profile=source.profile,
        text_tokens=context_tokens(source.job.model),
        provenance={name: source.provenance[name] for name in PROVENANCE},
        clip_size=size,
        sampled_streams=sorted(str(stream.value) for stream in source.job.sampled_streams),
    )


def _write_report(work: Work, files: Sequence[Path]) -> Path:
    """What was written, from what, and what it changes: OUT.report.json."""
    from dataclasses import asdict

    from ltx2_train.evals.files import write_json

    out, path = work.options.out, _report_path(work.options)
    written = {"form": work.options.to, "files": {str(f.relative_to(out.parent)): f.stat().st_size for f in files}}
    write_json(path, {**written, **asdict(work.provenance), "streams": work.coverage.report()})
    return path


# --- what is refused, and what is said ---


def _check_place(options: argparse.Namespace) -> None:
    from ltx2_train.errors import ConfigError

    out = options.out
    if options.to == "diffusers":
        if out.suffix == ".safetensors":
            raise ConfigError(f"--out {out}: the diffusers form is a folder. Give a name without .safetensors")
    elif out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: give a name that ends in .safetensors")
    for name in ("max_shard_gb", "reference_downscale", "reference_temporal"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: needs to be above 0")


def _check_free(files: Iterable[Path]) -> None:
    """Raises `ConfigError` where something would be written over."""
    from ltx2_train.errors import ConfigError

    if there := [path for path in files if path.exists()]:
        raise ConfigError(f"{there[0]} exists. Move it away, or write elsewhere with --out")


def _report_path(options: argparse.Namespace) -> Path:
    return options.out.with_name(f"{options.out.name}.report.json")


def _card_path(options: argparse.Namespace) -> Path:
    """Beside the file, or in the folder of the diffusers form."""
    return (options.out if options.to == "diffusers" else options.out.parent) / "README.md"


def _check_form(form: str, source: "Source") -> None:
    from ltx2_train.errors import ConfigError

    if source.job.lora is None and form in (*LORA_FORMS, "merged"):
        raise ConfigError(f"--to {form}: {source.directory} trained all weights, there are no adapters. Use --to full")
    if source.job.lora is not None and form == "full":
        raise ConfigError(f"--to full: {source.directory} trained adapters. Use --to merged, or --to lora")


def _check_connectors(model: "nn.Module", source: "Source") -> None:
    """Raises `ConfigError` where connectors would be left out that are not those of any base."""
    from ltx2_train.errors import ConfigError

    if any("_embeddings_connector." in name for name, p in model.named_parameters() if p.requires_grad):
        raise ConfigError(
            f"--to diffusers: {source.directory} trained the connectors, which diffusers keeps with the text projections, "
            "and there are none. Give --base a file with text_embedding_projection.*, or use --to transformer"
        )


def _check_card(source: "Source") -> None:
    """Raises `DataError` where there is nothing to make a card of, before anything large is written."""
    from ltx2_train.evals.runrecord import read_run

    read_run(source.directory)


def _remarks(options: argparse.Namespace, source: "Source", base: "Base | None") -> Iterator[str]:
    """What a person should know before it is written."""
    if options.to in LORA_FORMS:
        return
    if base is None:
        yield "no base: transformer and connectors alone, the architecture is the run's; VAEs and text are not in it"
    elif base.file is None and options.to in ("merged", "full"):
        yield f"{base.path.name} is a folder of diffusers: VAEs, vocoder and text projections stay there"
    elif source.start is None:
        yield f"trained from scratch: only what stands beside the transformer comes from {base.path.name}"
    if options.to == "diffusers" and (base is None or not base.projections):
        yield "no connectors/: diffusers keeps the text projections there, and the base has none"


if __name__ == "__main__":
    sys.exit(main())
