"""Whether data belong to released weights: the names of what made a dataset, held against the parts of those weights.

Latents of all generations have the same shapes, text features of two of them as well: nothing else would tell.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from ltx2_train import codecs, text
from ltx2_train.cli.contexts import connectors_name
from ltx2_train.errors import CheckpointError, DataError
from ltx2_train.model.generation import generation_of
from ltx2_train.model.weights import fingerprint, read_config
from ltx2_train.record import UNKNOWN, Manifest, TextCache

logger = logging.getLogger(__name__)

TELLS_NOTHING = (UNKNOWN, *codecs.EMBEDDED, *text.EMBEDDED)  # how names begin that say nothing of released parts
TEXT_KINDS = {  # language model and feature extractor of the released generations
    "2.0": ("gemma3", "features-v1"),
    "2.3": ("gemma3", "features-v2"),
    "2.5": ("gemma4", "features-v2"),
}


def check_belongs(weights: str | None, manifest: Manifest, location: str) -> None:
    """Raises `DataError` for data that another part made than that which lies in `weights`, or text of another generation.

    Where there is nothing to compare, because the name is unknown or a stand-in's, there is a warning. `location` is the
    dataset's, for messages. From scratch, without weights, anything goes.
    """
    if weights is None:
        return
    for setting, own in _own_parts(weights, manifest.text_cache):
        _check_part(setting, getattr(manifest, setting), own, weights, location)
    _check_kinds(weights, manifest, location)


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


def _check_part(setting: str, found: str, own: str, weights: str, location: str) -> None:
    if not found.startswith(UNKNOWN) and own not in found.split("+"):
        raise DataError(
            f"{location} was encoded with {setting} {found!r}; {weights} has {own!r}. "
            f"Encode it again with data_prep.encode, or use the weights that belong to {found!r}"
        )


def _check_kinds(weights: str, manifest: Manifest, location: str) -> None:
    """What needs no part in the weights: the kind of text features, and whether the names say anything at all."""
    for setting in ("video_codec", "audio_codec", "text_encoder"):
        name = getattr(manifest, setting)
        if name.startswith(TELLS_NOTHING):
            logger.warning(
                "%s: its %s is %r, so nothing tells whether it belongs to %s. If it does not, the run learns from noise",
                location,
                setting,
                name,
                weights,
            )
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
