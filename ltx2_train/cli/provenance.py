"""Whether data belong to released weights: the names of what made a dataset, held against the parts of those weights.

Latents of all generations have the same shapes, text features of two of them as well: nothing else would tell.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ltx2_train import codecs, text
from ltx2_train.cli.contexts import connectors_name
from ltx2_train.errors import CheckpointError, DataError
from ltx2_train.model.generation import generation_of
from ltx2_train.model.weights import fingerprint, header, read_config
from ltx2_train.record import UNKNOWN, Manifest, TextCache

logger = logging.getLogger(__name__)

PARTS = ("video_codec", "audio_codec", "text_encoder")  # of a manifest, by name
EMBEDDED = (*codecs.EMBEDDED, *text.EMBEDDED)
TELLS_NOTHING = (UNKNOWN, *EMBEDDED)  # how names begin that say nothing of released parts
TEXT_KINDS = {  # language model and feature extractor of the released generations
    "2.0": ("gemma3", "features-v1"),
    "2.3": ("gemma3", "features-v2"),
    "2.5": ("gemma4", "features-v2"),
}


def made_with(weights: str | Path) -> dict[str, str]:
    """Names of what made the data that weights were trained on, by setting of a manifest, as `ltx2-export` states them.

    Empty for published weights. A name that tells nothing is left out.
    """
    stated = header(weights).get("provenance")
    names = {part: stated.get(part) for part in PARTS} if isinstance(stated, dict) else {}
    return {part: name for part, name in names.items() if isinstance(name, str) and not name.startswith(UNKNOWN)}


def embedded_parts(names: Mapping[str, str]) -> dict[str, str]:
    """Those of `names` that are of embedded parts."""
    return {part: name for part, name in names.items() if name in EMBEDDED}


def check_belongs(weights: str | None, manifest: Manifest, location: str) -> None:
    """Raises `DataError` for data that another part made than that which lies in `weights`, or that made the data which
    these were trained on; and for text of another generation.

    Where there is nothing to compare, because a name is unknown or a stand-in's, there is one warning. `location` is the
    dataset's, for messages. From scratch, without weights, anything goes.
    """
    if weights is None:
        return
    stated = made_with(weights)
    for setting, own in (*_own_parts(weights, manifest.text_cache), *_comparable(stated, manifest)):
        _check_part(setting, getattr(manifest, setting), own, weights, location)
    _check_generation(weights, manifest, location)
    _warn_of_silence([part for part in PARTS if part not in stated], weights, manifest, location)


def _own_parts(weights: str, text_cache: str) -> Iterator[tuple[str, str]]:
    """(setting of a manifest, name of the part that lies in the weights); of the text encoder's name what they know."""
    if codecs.has_video_codec(weights):
        yield "video_codec", codecs.video_codec_name(weights)
    if codecs.has_audio_codec(weights):
        yield "audio_codec", codecs.audio_codec_name(weights)
    if text.has_projection(weights):
        yield "text_encoder", text.projection_name(weights)
    if text_cache == TextCache.CONTEXT and (connectors := connectors_name(weights)) is not None:
        yield "text_encoder", connectors


def _comparable(stated: Mapping[str, str], manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What of `stated` the data have to have: codecs, and the text encoder where one of the two is a stand-in.

    The names of released text encoders have parts that may differ, and those that may not are compared by what lies in
    the weights and by generation.
    """
    for part, name in stated.items():
        stand_in = any(one.startswith(text.EMBEDDED) for one in (name, manifest.text_encoder))
        if part != "text_encoder" or stand_in:
            yield part, name


def _check_part(setting: str, found: str, own: str, weights: str, location: str) -> None:
    if not found.startswith(UNKNOWN) and own not in (found, *found.split("+")):
        raise DataError(
            f"{location} was encoded with {setting} {found!r}; {weights} has {own!r}. "
            f"Encode it again with data_prep.encode, or use the weights that belong to {found!r}"
        )


def _warn_of_silence(unstated: Sequence[str], weights: str, manifest: Manifest, location: str) -> None:
    """One warning where names say nothing: unknown ones, and stand-ins of data beside weights that state none."""
    names = {part: getattr(manifest, part) for part in PARTS}
    silent = {p: n for p, n in names.items() if n.startswith(TELLS_NOTHING if p in unstated else UNKNOWN)}
    if silent:
        logger.warning(
            "%s: its %s; so nothing tells whether it belongs to %s. If it does not, the run learns from noise: train on "
            "data that the parts of these weights encoded. Weights of a run of your own state theirs when they are "
            "exported (again) with ltx2-export",
            location,
            ", ".join(f"{part} is {name!r}" for part, name in silent.items()),
            weights,
        )


def _check_generation(weights: str, manifest: Manifest, location: str) -> None:
    """What needs no part in the weights: the kind of text features."""
    generation, name = generation_of(read_config(weights)), manifest.text_encoder
    if generation not in TEXT_KINDS or name.startswith(TELLS_NOTHING):
        return
    kinds = [part.partition(":")[0] for part in name.split("+")]
    if any(kind not in kinds for kind in TEXT_KINDS[generation]):
        raise DataError(
            f"{location} was encoded with text_encoder {name!r}; {weights} is LTX-{generation}, which was trained with "
            f"{' and '.join(TEXT_KINDS[generation])}. Encode the captions again with its text encoder"
        )


def check_base(path: str, recorded: str | None, run: str | Path) -> None:
    """Raises `CheckpointError` unless these weights are what a run started from; `recorded`: the fingerprint it noted."""
    if recorded is not None and (found := fingerprint(path)) != recorded:
        raise CheckpointError(
            f"{path}: not what {run} started from (fingerprint {found[:12]}, the run's is {recorded[:12]}). "
            "Give the file it started from with --base"
        )
