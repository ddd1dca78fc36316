"""What made a dataset is held against the parts that lie in released weights: every part, and the generation."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ltx2_train.cli.contexts import connectors_name, context_encoder
from ltx2_train.cli.provenance import TEXT_KINDS, check_belongs
from ltx2_train.codecs import audio_codec_name, video_codec_name
from ltx2_train.errors import DataError
from ltx2_train.model.export import Base, Provenance, official_layout, write_diffusers
from ltx2_train.record import Manifest
from ltx2_train.testing.released import GENERATIONS, Release, write_release
from ltx2_train.text import projection_name
from ltx2_train.weightfile import write_weights
from tests.unit.cli.commands import small_dataset


@pytest.fixture(scope="module")
def releases(tmp_path_factory) -> dict[str, Release]:
    return {name: write_release(tmp_path_factory.mktemp(name), name) for name in GENERATIONS}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Manifest:
    return Manifest.load(small_dataset(tmp_path_factory.mktemp("data") / "latents"))


def belonging(manifest: Manifest, release: Release, generation: str, **names: str) -> Manifest:
    """The manifest of a dataset that the release's own parts made."""
    projection = projection_name(release.text_projection)
    own = {
        "video_codec": video_codec_name(release.video_vae),
        "audio_codec": audio_codec_name(release.audio_vae),
        "text_encoder": f"{TEXT_KINDS[generation][0]}:0123456789ab+{projection}",
    }
    return replace(manifest, **(own | names))


def contexts(manifest: Manifest, release: Release, connectors: str | None = None) -> Manifest:
    name = connectors or connectors_name(str(release.transformer))
    return replace(manifest, text_cache="context", text_encoder=f"{manifest.text_encoder}+{name}")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_the_weights_parts_made_belongs_to_them(releases, stand_ins, caplog, generation):
    release = releases[generation]
    manifest = belonging(stand_ins, release, generation)
    for own in (manifest, contexts(manifest, release)):
        check_belongs(str(release.transformer), own, "latents")
    assert not caplog.records


def wrong() -> Iterator[Any]:
    text = "gemma3:0123456789ab+features-v2:fedcba987654"
    for name, value in (("video_codec", "ltx2-video-0"), ("audio_codec", "ltx2-audio-0"), ("text_encoder", text)):
        yield pytest.param({name: value}, id=name)
    yield from (pytest.param({name: "dct-1"}, id=f"stand-in-{name}") for name in ("video_codec", "audio_codec"))
    yield pytest.param({"text_encoder": "hashed-1"}, id="stand-in-text")


@pytest.mark.parametrize("names", wrong())
def test_what_another_part_made_is_refused(releases, stand_ins, names):
    release = releases["2.3"]
    with pytest.raises(DataError, match=f"latents was encoded with {next(iter(names))} .*ltx-2.3.safetensors has"):
        check_belongs(str(release.transformer), belonging(stand_ins, release, "2.3", **names), "latents")


def test_contexts_of_other_connectors_are_refused(releases, stand_ins):
    release = releases["2.5"]
    manifest = contexts(belonging(stand_ins, release, "2.5"), release, "connectors:0123456789ab")
    with pytest.raises(DataError, match="has 'connectors:"):
        check_belongs(str(release.transformer), manifest, "latents")


def test_text_of_another_generation_is_refused_where_the_weights_hold_no_projection(releases, stand_ins):
    manifest = belonging(stand_ins, releases["2.3"], "2.3")
    with pytest.raises(DataError, match=r"is LTX-2.5, which was trained with gemma4 and features-v2"):
        check_belongs(str(releases["2.5"].transformer), manifest, "latents")


@pytest.mark.parametrize("generation", ["2.3", "2.5"])
def test_unknown_names_are_warned_of(releases, stand_ins, caplog, generation):
    names = dict.fromkeys(("video_codec", "audio_codec", "text_encoder"), "unknown:mine")
    with caplog.at_level(logging.WARNING):
        check_belongs(str(releases[generation].transformer), replace(stand_ins, **names), "latents")
    [record] = caplog.records
    assert all(f"{part} is 'unknown:mine'" in record.message for part in names)


def test_stand_ins_are_warned_of_beside_weights_without_such_parts(releases, stand_ins, caplog):
    stand_ins = replace(stand_ins, **STAND_INS)
    check_belongs(str(releases["2.5"].transformer), stand_ins, "latents")
    [record] = caplog.records
    assert "text_encoder is 'hashed-1'" in record.message
    assert "train on data that the parts of these weights encoded" in record.message
    check_belongs(None, stand_ins, "latents")
    assert len(caplog.records) == 1, "from scratch anything goes"


STAND_INS = {"video_codec": "dct-1", "audio_codec": "dct-1", "text_encoder": "hashed-1"}


@pytest.fixture
def exported(releases, tmp_path):
    """A function that writes the transformer of 2.5 with these names of what made its training data in the header."""
    base = Base(releases["2.5"].transformer)

    def write(**names: str) -> str:
        keys, header = official_layout(base.config, base.tensors, None, with_siblings=False)
        origin = Provenance(step=1, weights="raw", base_generation="2.5", provenance=names)
        [path] = write_weights(tmp_path / "exported.safetensors", keys, header | origin.metadata())
        return str(path)

    return write


def test_data_of_the_parts_that_an_export_states_belong_to_it(exported, releases, stand_ins, caplog):
    check_belongs(exported(**STAND_INS), replace(stand_ins, **STAND_INS), "latents")
    contexts = {**STAND_INS, "text_encoder": "hashed-1+connectors:" + connectors_name(exported(**STAND_INS))[-12:]}
    check_belongs(exported(**contexts), replace(stand_ins, **contexts, text_cache="context"), "latents")
    real = belonging(stand_ins, releases["2.5"], "2.5")
    named = {part: getattr(real, part) for part in STAND_INS}
    check_belongs(exported(**named), real, "latents")
    other = {**named, "text_encoder": named["text_encoder"].replace("0123456789ab", "of-another-dtype")}
    check_belongs(exported(**named), replace(real, **other), "latents")
    assert not caplog.records


@pytest.mark.parametrize("part", STAND_INS)
def test_data_of_other_parts_than_an_export_states_are_refused(exported, releases, stand_ins, part):
    real, stand_ins = belonging(stand_ins, releases["2.5"], "2.5"), replace(stand_ins, **STAND_INS)
    for trained_on, given in ((real, stand_ins), (stand_ins, real)):
        path = exported(**{part: getattr(trained_on, part)})
        with pytest.raises(DataError, match=f"was encoded with {part} .*exported.safetensors has"):
            check_belongs(path, given, "latents")


def test_an_export_that_knows_nothing_of_its_data_is_warned_of(exported, stand_ins, caplog):
    unknown = dict.fromkeys(STAND_INS, "unknown:mine")
    check_belongs(exported(**unknown), replace(stand_ins, **STAND_INS), "latents")
    check_belongs(exported(**STAND_INS), replace(stand_ins, **unknown), "latents")
    assert len(caplog.records) == 2


def test_a_folder_of_the_transformer_alone_has_no_parts_to_compare(releases, stand_ins, tmp_path):
    base = Base(releases["2.5"].transformer)
    write_diffusers(tmp_path / "folder", base.config, base.tensors, {}, {})
    check_belongs(str(tmp_path / "folder"), belonging(stand_ins, releases["2.5"], "2.5"), "latents")


def test_connectors_are_called_as_in_the_names_of_context_encoders(releases):
    class Features:
        name, video_width, audio_width = "gemma3:0+features-v2:0", 40, 20

    path = str(releases["2.3"].transformer)
    assert context_encoder(Features(), path, "cpu").name == f"{Features.name}+{connectors_name(path)}"
