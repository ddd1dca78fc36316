"""Raw shards become latent shards: in the right bucket, beside the right sound, killed and continued without loss."""

import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import console
from data_prep import encode as encode_module
from data_prep.buckets import parse_buckets
from data_prep.dropped import EmptyCaption
from data_prep.encode import RawShard, encode, main
from data_prep.encode_config import Dtype, EncodeConfig
from data_prep.jobs import Job
from data_prep.pack import PackConfig, pack
from data_prep.raw import parse_key_map
from data_prep.splits import HoldoutBy, name_hash
from data_prep.tars import file_sha256, write_tar
from ltx2_train.cli.entry import EXIT_ERROR
from ltx2_train.codecs import build_audio_codec, build_video_codec
from ltx2_train.codecs.resample import to_stereo
from ltx2_train.data.datasets import open_dataset
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.geometry import audio_latent_length
from ltx2_train.media.audio import read_audio
from ltx2_train.media.video import read_video
from ltx2_train.media.write import write_flac, write_mp4
from ltx2_train.model.config import named_config
from ltx2_train.record import Sample, TextFeatures
from ltx2_train.text import build_text_encoder
from tests.unit.media.media_files import (
    FPS,
    RATE,
    click_waveform,
    encode_frames,
    encode_sound,
    flip_bits,
    ramp_frames,
)


def samples(directory: Path) -> dict[str, Sample]:
    dataset = open_dataset(directory)
    return {sample.key: sample for sample in (dataset.read(i) for i in range(len(dataset)))}


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of everything that a dataset consists of."""
    files = [p for p in directory.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


def dropped(out: Path) -> dict[str, str]:
    rows = map(json.loads, (out / "dropped.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


@pytest.fixture
def foreign(tmp_path, clip):
    """A function that writes a raw shard of given records, without a listing of hashes; returns its path."""

    def write(records: dict[str, dict[str, bytes]], name: str = "shard.tar") -> str:
        write_tar(tmp_path / name, records.items())
        return str(tmp_path / name)

    return write


# --- what is written ---


def test_every_clip_of_the_world_is_encoded_once(raw, world, tmp_path, config):
    counts = encode([str(raw)], tmp_path, config)
    rows = {row["video"]: row for row in map(json.loads, world.read_text().splitlines())}
    found = samples(tmp_path / "train")
    assert counts["all"]["kept"] == len(found) == len(rows) == 14
    for sample in found.values():
        row = rows[sample.meta["source"]]
        is_image = row["video"].endswith(".png")
        assert (sample.caption, sample.fps) == (row["caption"], 1.0 if is_image else 24.0)
        assert sample.meta["truth"]["impact_times"] == row["impact_times"]
        assert sample.meta["split"] == "train"
        assert sample.video is not None
        assert sample.video.shape == (128, 1 if is_image else 3, 2, 2)
        assert (sample.audio is not None) == row["has_audio"]
        assert sample.text.video.shape[1] == 16
        if sample.audio is not None:
            assert sample.audio.shape == (8, audio_latent_length(17, 24.0), 16)


def test_latents_are_those_of_the_codecs_on_the_file_itself(raw, world, tmp_path, config):
    encode([str(raw)], tmp_path, replace(config, dtype=Dtype.FP32))
    sample = next(s for s in samples(tmp_path / "train").values() if s.audio is not None)
    path = world.parent / sample.meta["source"]
    video = build_video_codec("dct").encode(read_video(path)[0][None])[0]
    waveform, rate = read_audio(path, duration=audio_latent_length(17, 24.0) / 25)
    audio = build_audio_codec("dct").encode(to_stereo(waveform)[None], rate)[0]
    torch.testing.assert_close(sample.video, video, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample.audio, audio, rtol=1e-5, atol=1e-5)


def test_a_finished_dataset_opens_and_says_where_it_came_from(raw, tmp_path, config):
    encode([str(raw)], tmp_path, config)
    dataset = open_dataset(tmp_path / "train")
    manifest = dataset.manifest
    assert (manifest.video_codec, manifest.text_encoder) == ("dct-1", "hashed-1")
    assert manifest.shards == {p.name: file_sha256(str(p)) for p in (tmp_path / "train").glob("*.tar")}
    assert manifest.settings["buckets"] == "64x64x17;64x64x1"
    assert manifest.counts["kept"] == 14
    assert len(manifest.settings["raw"]) == len(list(raw.glob("*.tar")))
    [null] = build_text_encoder("hashed", 16, 8).encode([""])
    assert torch.equal(dataset.null_text.video, null.video)


def test_a_long_clip_becomes_windows_and_its_remainder_is_counted(foreign, tmp_path, clip, config):
    path = foreign({"a": {"mp4": clip.read_bytes(), "txt": b"a ramp"}})
    counts = encode([path], tmp_path / "out", replace(config, buckets=parse_buckets("64x32x9")))
    found = samples(tmp_path / "out" / "train")
    assert counts["all"]["remainder_frames"] == 25 - 2 * 9
    assert sorted(found) == ["a-w0000", "a-w0001"]
    assert [found[k].meta["start"] for k in sorted(found)] == [0.0, 0.375]
    assert {s.caption for s in found.values()} == {"a ramp"}
    assert found["a-w0000"].video.shape == (128, 2, 1, 2)


def test_clips_are_brought_to_another_rate_only_where_that_is_asked_for(foreign, tmp_path, clip, config):
    path = foreign({"a": {"mp4": clip.read_bytes()}})
    encode([path], tmp_path / "out", replace(config, buckets=parse_buckets("64x64x9"), fps=12.0))
    found = samples(tmp_path / "out" / "train")
    assert [s.fps for s in found.values()] == [12.0]
    assert next(iter(found.values())).audio.shape[1] == round(25 * 9 / 12)


# --- sound ---


def test_a_clip_without_sound_has_no_audio_and_no_silence(foreign, tmp_path, config):
    mute = encode_frames(tmp_path / "m.mp4", ramp_frames(17)).read_bytes()
    encode([foreign({"a": {"mp4": mute}})], tmp_path / "out", config)
    [sample] = samples(tmp_path / "out" / "train").values()
    assert sample.audio is None
    assert sample.bucket.signature == "v"


@pytest.mark.parametrize(
    ("missing", "count", "signature"),
    [(0.0, None, "va"), (0.15, "audio_padded", "va"), (0.4, "audio_too_short_treated_as_missing", "v")],
)
def test_sound_that_ends_early_is_padded_a_little_or_counted_as_missing(
    foreign, tmp_path, config, missing, count, signature
):
    path = tmp_path / "a.mp4"
    write_mp4(path, ramp_frames(17), FPS, click_waveform(17 / FPS - missing), RATE)
    counts = encode([foreign({"a": {"mp4": path.read_bytes()}})], tmp_path / "out", config)
    [sample] = samples(tmp_path / "out" / "train").values()
    assert sample.bucket.signature == signature
    assert {name for name in counts["all"] if name.startswith("audio_")} == ({count} if count else set())


def test_a_sound_file_of_its_own_takes_the_place_of_the_clips_sound(foreign, tmp_path, clip, config):
    write_flac(tmp_path / "a.flac", np.zeros((1, 48000), dtype=np.float32), 48000)
    members = {"mp4": clip.read_bytes(), "flac": (tmp_path / "a.flac").read_bytes()}
    encode([foreign({"a": members})], tmp_path / "out", config)
    [sample] = samples(tmp_path / "out" / "train").values()
    silence = build_audio_codec("dct").encode(torch.zeros(1, 2, 12000), 16000)[0]
    assert torch.allclose(sample.audio.float(), silence[:, : sample.audio.shape[1]].bfloat16().float(), atol=1e-2)


def test_sound_alone_is_dropped_by_name_or_kept_in_windows(foreign, tmp_path, config):
    write_flac(tmp_path / "a.flac", click_waveform(1.1), RATE)
    path = foreign({"a": {"flac": (tmp_path / "a.flac").read_bytes()}})
    with pytest.raises(DataError, match="nothing was kept"):
        encode([path], tmp_path / "no", config)
    assert dropped(tmp_path / "no") == {"a": "audio_only"}
    counts = encode([path], tmp_path / "yes", replace(config, audio_only_seconds=0.48))
    found = samples(tmp_path / "yes" / "train")
    assert [s.bucket.signature for s in found.values()] == ["a", "a"]
    assert counts["all"]["remainder_audio_milliseconds"] == pytest.approx(140, abs=2)


def test_a_gap_inside_the_sound_is_missing_sound_and_no_silence(foreign, tmp_path, clip, config):
    small = replace(config, buckets=parse_buckets("64x64x9"), audio_only_seconds=0.36)  # 9 frames last 0.375 s
    sound = encode_sound(tmp_path / "s.wav", click_waveform(25 / FPS)).read_bytes()
    broken = encode_sound(tmp_path / "b.mka", click_waveform(1.2), codec="flac", hole=(0.0001, 0.5)).read_bytes()
    records = {"whole": {"mp4": clip.read_bytes(), "wav": sound}, "broken": {"mp4": clip.read_bytes(), "flac": broken}}
    counts = encode([foreign(records | {"alone": {"flac": broken}})], tmp_path / "out", small)["all"]
    found = samples(tmp_path / "out" / "train")
    assert {key: s.bucket.signature for key, s in found.items()} == {
        "whole-w0000": "va",
        "whole-w0001": "va",
        "broken-w0000": "v",
        "broken-w0001": "va",
        "alone-w0001": "a",
        "alone-w0002": "a",
    }
    assert counts["audio_with_gaps_treated_as_missing"] == 2


def test_gaps_that_pack_tells_are_missing_sound(foreign, tmp_path, clip, config):
    write_flac(tmp_path / "a.flac", click_waveform(), RATE)
    told = json.dumps({"audio_start": 0.0, "audio_end": 1.04, "audio_gaps": [[0.1, 0.5]]}).encode()
    record = {"mp4": clip.read_bytes(), "flac": (tmp_path / "a.flac").read_bytes(), "json": told}
    encode([foreign({"a": record})], tmp_path / "out", config)
    assert [s.audio for s in samples(tmp_path / "out" / "train").values()] == [None]


# --- held out ---


def test_the_split_goes_by_source_file(foreign, tmp_path, clip, config):
    records = {
        f"c{i}": {"mp4": clip.read_bytes(), "json": json.dumps({"source": f"f{i % 4}"}).encode()} for i in range(8)
    }
    path = foreign(records)
    small = replace(config, buckets=parse_buckets("64x64x9"), holdout_count=1)
    counts = encode([path], tmp_path / "out", small)
    train, held_out = (samples(tmp_path / "out" / name) for name in ("train", "heldout"))
    sources = [{s.meta["source"] for s in part.values()} for part in (train, held_out)]
    assert (len(sources[0]), len(sources[1])) == (3, 1)
    assert not sources[0] & sources[1]
    assert counts["all"]["kept_heldout"] == len(held_out) == 4  # two windows of two clips
    assert {s.meta["split"] for s in held_out.values()} == {"heldout"}


def test_no_source_is_on_both_sides_when_shards_are_added(foreign, tmp_path, clip, config):
    names = sorted((f"film{i}" for i in range(12)), key=name_hash)

    def shard(name: str, sources: list[str]) -> str:
        records = {
            f"{name}{i}": {"mp4": clip.read_bytes(), "json": json.dumps({"source": source}).encode()}
            for i, source in enumerate(sources)
        }
        return foreign(records, f"{name}.tar")

    first, second = shard("a", names[5:10]), shard("b", [names[5], names[6], names[0]])
    third = shard("c", [names[11]])
    small = replace(config, holdout_count=2)
    encode([first, third], tmp_path / "grown", small)
    untouched = (tmp_path / "grown" / ".shards" / "c.json").stat().st_mtime_ns
    encode([first, second, third], tmp_path / "grown", small)
    train, held_out = (
        {s.meta["source"] for s in samples(tmp_path / "grown" / split).values()} for split in ("train", "heldout")
    )
    assert held_out == {names[0], names[5]}
    assert not train & held_out
    assert (tmp_path / "grown" / ".shards" / "c.json").stat().st_mtime_ns == untouched
    encode([first, second, third], tmp_path / "at_once", small)
    tars = [{k: v for k, v in contents(tmp_path / d).items() if k.endswith(".tar")} for d in ("grown", "at_once")]
    assert tars[0] == tars[1]


@pytest.mark.parametrize("how", [{"holdout_count": 2}, {"holdout": 0.4}])
def test_held_out_captions_are_none_that_training_sees(foreign, tmp_path, clip, config, how):
    texts = [f"a ball of colour {i % 5}" for i in range(10)]
    records = {f"c{i}": {"mp4": clip.read_bytes(), "txt": f" {text}\n".encode()} for i, text in enumerate(texts)}
    small = replace(config, buckets=parse_buckets("64x64x9"), holdout_by=HoldoutBy.CAPTION, **how)
    encode([foreign(records)], tmp_path / "out", small)
    train, held_out = (samples(tmp_path / "out" / split) for split in ("train", "heldout"))
    seen, unseen = ({s.caption for s in part.values()} for part in (train, held_out))
    assert unseen
    assert seen | unseen == set(texts)
    assert not seen & unseen
    assert "holdout_count" not in how or unseen == set(sorted(seen | unseen, key=name_hash)[:2])


@pytest.mark.parametrize(("share", "is_warned"), [("0.000001", True), ("0.5", False)])
def test_a_share_that_meets_no_source_is_told_with_the_way_out(raw, tmp_path, capsys, share, is_warned):
    main([str(raw), "--out", str(tmp_path), "--buckets", "64x64x17;64x64x1", "--holdout", share, "--workers", "1"])
    printed = capsys.readouterr()
    assert ("no clip is held out" in printed.err and "--holdout-count N" in printed.err) == is_warned
    datasets = [str(tmp_path / "train")] + [str(tmp_path / "heldout")] * (not is_warned)
    assert f"datasets: {', '.join(datasets)}\n" in printed.out
    assert (tmp_path / "heldout").exists() != is_warned


def test_a_named_model_gives_the_text_widths_that_it_takes(raw, tmp_path):
    arguments = [str(raw), "--out", str(tmp_path), "--buckets", "64x64x17;64x64x1", "--model", "tiny"]
    with pytest.raises(ConfigError, match=r"--model tiny sets both text widths \(40 and 20\)"):
        main([*arguments, "--audio-text-width", "20"])
    main([*arguments, "--workers", "1"])
    manifest, model = open_dataset(tmp_path / "train").manifest, named_config("tiny")
    widths = model.video_connector_width, model.audio_connector_width
    assert (manifest.video_text_width, manifest.audio_text_width) == widths == (40, 20)
    assert "model" not in manifest.settings  # it is the same dataset as with the widths given


def test_a_mistake_ends_the_programs_with_the_exit_code_of_all_others(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        console.run(main, [str(tmp_path / "nothing"), "--out", str(tmp_path / "out"), "--buckets", "64x64x17"])
    assert stop.value.code == EXIT_ERROR == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_holding_out_everything_is_refused(raw, tmp_path, config):
    with pytest.raises(ConfigError, match="holdout_count: 14; need less than the 14 that there are"):
        encode([str(raw)], tmp_path, replace(config, holdout_count=14))


def test_a_shard_is_written_as_its_samples_come(tmp_path, monkeypatch):
    def drawn(windows, codecs, config):
        for i in range(12):
            text = TextFeatures(torch.zeros(1, 4), torch.zeros(1, 4))
            sample = Sample(
                key=f"{i:02d}",
                video=torch.full((128, 1, 2, 2), float(i)),
                audio=None,
                text=text,
                fps=24.0,
                caption="",
                meta={"source": f"{i:02d}"},
            )
            drawn_so_far.append(weakref.ref(sample.video))
            alive.append(sum(video() is not None for video in drawn_so_far))
            yield sample

    drawn_so_far, alive = [], []
    monkeypatch.setattr(encode_module, "encode_windows", drawn)
    job = Job("s", "", RawShard("nowhere.tar", None, frozenset({"03", "07"})))
    report = encode_module.encode_shard(job, tmp_path, EncodeConfig(buckets=parse_buckets("64x64x1")))
    assert max(alive) <= 3 + 2  # what is on its way, and the held-out ones
    assert sorted(report.outputs) == ["heldout/s.tar", "train/s.tar"]
    assert report.keys[-2:] == ["03", "07"]
    assert len(report.keys) == report.counts["kept"] == 12


# --- bad input ---


def test_bad_records_are_dropped_and_named_with_their_reason(foreign, tmp_path, clip, config):
    content = clip.read_bytes()
    records = {
        "good": {"mp4": content, "txt": b"x"},
        "cut": {"mp4": content[: len(content) * 2 // 3], "txt": b"x"},
        "flipped": {"mp4": flip_bits(content), "txt": b"x"},
        "short": {"mp4": encode_frames(tmp_path / "s.mp4", ramp_frames(5)).read_bytes(), "txt": b"x"},
        "bare": {"txt": b"x"},
        "json": {"mp4": content, "json": b"{", "txt": b"x"},
        "wordless": {"mp4": content, "txt": b" "},
    }
    dropping = replace(config, empty_caption=EmptyCaption.DROP)
    counts = encode([foreign(records)], tmp_path / "out", dropping)
    assert dropped(tmp_path / "out") == {
        "cut": "truncated",
        "flipped": "corrupt",
        "short": "too_short",
        "bare": "no_video_and_no_audio",
        "json": "corrupt",
        "wordless": "empty_caption",
    }
    assert counts["all"]["clips_read"] == 7
    assert list(samples(tmp_path / "out" / "train")) == ["good"]


def test_a_packed_shard_that_changed_is_refused_and_the_others_are_finished(world, tmp_path, config):
    pack(world, tmp_path / "raw", PackConfig(clips_per_shard=5))
    shard = tmp_path / "raw" / "shard-000001.tar"
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (bytes(damaged), whole[: len(whole) // 2]):
        shard.write_bytes(content)
        with pytest.raises(
            DataError, match=r"1 of 3 shards failed.*shard-000001\.tar: its SHA-256 .*re-run data_prep\.pack"
        ):
            encode([str(tmp_path / "raw")], tmp_path / "out", config)
        assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    shard.write_bytes(whole)
    assert encode([str(tmp_path / "raw")], tmp_path / "out", config)["all"]["kept"] == 14


def test_a_foreign_shard_that_is_cut_short_is_refused_by_name(foreign, tmp_path, clip, config):
    path = Path(foreign({f"c{i}": {"mp4": clip.read_bytes()} for i in range(3)}))
    path.write_bytes(path.read_bytes()[: clip.stat().st_size * 2])
    with pytest.raises(DataError, match=r"shard\.tar: (damaged or )?truncated.* after member"):
        encode([str(path)], tmp_path / "out", config)


def test_a_key_in_two_shards_is_refused(foreign, tmp_path, clip, config):
    paths = [foreign({"a": {"mp4": clip.read_bytes()}}, name) for name in ("x.tar", "y.tar")]
    with pytest.raises(DataError, match=r"key 'a' comes twice, in .*x\.tar and .*y\.tar"):
        encode(paths, tmp_path / "out", config)


def test_finished_latents_of_other_shards_are_not_deleted_unasked(foreign, tmp_path, clip, config):
    one, other = (foreign({name: {"mp4": clip.read_bytes()}}, f"{name}.tar") for name in ("one", "other"))
    (tmp_path / "elsewhere").mkdir()
    same_name = foreign({"two": {"mp4": clip.read_bytes()}}, "elsewhere/one.tar")
    encode([one], tmp_path / "out", config)
    before = contents(tmp_path / "out")
    for path in (other, same_name):
        with pytest.raises(DataError, match=r"not made from this input: train/one\.tar\. Give another --out"):
            encode([path], tmp_path / "out", config)
        assert contents(tmp_path / "out") == before
    encode([one, other], tmp_path / "out", config)
    assert set(samples(tmp_path / "out" / "train")) == {"one", "other"}
    encode([other], tmp_path / "out", config, replace=True)
    assert set(samples(tmp_path / "out" / "train")) == {"other"}


def test_a_dataset_of_which_a_shard_is_done_anew_is_not_finished(foreign, tmp_path, clip, config):
    path = foreign({"a": {"mp4": clip.read_bytes()}})
    encode([path], tmp_path / "out", config)
    Path(path).write_bytes(b"damaged")
    with pytest.raises(DataError, match="1 of 1 shards failed"):
        encode([path], tmp_path / "out", config)
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_a_packed_shard_that_became_another_and_is_damaged_leaves_no_finished_dataset(world, tmp_path, config):
    pack(world, tmp_path / "raw", PackConfig(clips_per_shard=5))
    encode([str(tmp_path / "raw")], tmp_path / "out", config)
    listing = tmp_path / "raw" / "pack.json"
    told = json.loads(listing.read_text())
    told["shards"]["shard-000001.tar"] = "0" * 64
    listing.write_text(json.dumps(told))
    with pytest.raises(DataError, match="1 of 3 shards failed"):
        encode([str(tmp_path / "raw")], tmp_path / "out", config)
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_a_record_with_corrupt_json_is_dropped_where_sources_are_counted_too(foreign, tmp_path, clip, config):
    records = {name: {"mp4": clip.read_bytes(), "json": b'{"source": "%s"}' % name.encode()} for name in "abc"}
    records["bad"] = {"mp4": clip.read_bytes(), "json": b"{"}
    counts = encode([foreign(records)], tmp_path / "out", replace(config, holdout_count=1))["all"]
    assert (counts["kept_train"], counts["kept_heldout"], counts["dropped_corrupt"]) == (2, 1, 1)


def test_captions_that_are_cut_or_cannot_be_read_are_counted_and_named(foreign, tmp_path, clip, config):
    captions = {"long": b"word " * 3000, "latin": "caf\xe9".encode("latin-1"), "short": "caf\xe9".encode()}
    path = foreign({key: {"mp4": clip.read_bytes(), "txt": caption} for key, caption in captions.items()})
    counts = encode([path], tmp_path / "out", config)["all"]
    assert (counts["caption_cut"], counts["dropped_caption_unreadable"]) == (1, 1)
    assert dropped(tmp_path / "out") == {"long": "caption_cut", "latin": "caption_unreadable"}
    rows = [json.loads(row) for row in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert {row["shard"] for row in rows} == {path}
    assert "the last 1977 rows" in next(row["detail"] for row in rows if row["file"] == "long")
    assert samples(tmp_path / "out" / "train")["short"].caption == "caf\xe9"


def test_members_that_nothing_reads_are_counted(foreign, tmp_path, clip, config):
    record = {"mp4": clip.read_bytes(), "wave": b"RIFF", "json": b"{}"}
    counts = encode([foreign({"a": record})], tmp_path / "out", config)["all"]
    assert {name: n for name, n in counts.items() if "members" in name} == {"members_not_read_(.wave)": 1}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"holdout": 1.0}, "holdout"),
        ({"holdout": 0.5, "holdout_count": 3}, "holdout_count"),
        ({"fps": 0.0}, "fps"),
        ({"audio_tolerance": -1.0}, "audio_tolerance"),
        ({"key_map": {"picture": ["mp4"]}}, "'picture' is none of video"),
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(field, message):
    with pytest.raises(ConfigError, match=message):
        EncodeConfig(buckets=parse_buckets("64x64x9"), **field)


# --- any WebDataset ---


def test_a_key_map_names_the_members_of_a_foreign_dataset(foreign, tmp_path, clip, config):
    record = {"clip.mp4": clip.read_bytes(), "prompt": b"ein Ball", "meta.json": b'{"stars": 3}'}
    path = foreign({"x/a": record})
    roles = parse_key_map("video=clip.mp4,caption=prompt,json=meta.json")
    encode([path], tmp_path / "out", replace(config, key_map=roles))
    [sample] = samples(tmp_path / "out" / "train").values()
    assert (sample.key, sample.caption, sample.meta["truth"]) == ("x/a", "ein Ball", {"stars": 3})


def test_shards_are_read_through_fsspec(raw, tmp_path, config):
    import fsspec

    for path in raw.glob("*.tar"):
        with fsspec.open(f"memory://raw/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    encode(["memory://raw/*.tar"], tmp_path / "remote", config)
    encode([str(raw)], tmp_path / "local", config)
    tars = [{k: v for k, v in contents(tmp_path / d).items() if k.endswith(".tar")} for d in ("remote", "local")]
    assert tars[0] == tars[1]


# --- killed and continued ---

DYING = """
import os, signal, sys
from data_prep import encode

real, calls = encode.write_shard, []

def write_shard(path, samples):
    calls.append(path)
    if len(calls) == 3:
        path.with_name(path.name + ".partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, samples)

encode.write_shard = write_shard
encode.main(sys.argv[1:])
"""


def arguments(raw: Path, out: Path, workers: int = 1) -> list[str]:
    buckets = ["--buckets", "64x64x17;64x64x1", "--holdout-count", "3"]
    return [str(raw), "--out", str(out), *buckets, "--workers", str(workers)]


def test_killed_in_the_middle_and_continued_is_the_same_to_the_byte(raw, tmp_path):
    killed = subprocess.run([sys.executable, "-c", DYING, *arguments(raw, tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    finished = list((tmp_path / "a" / ".shards").glob("*.json"))
    assert 0 < len(finished) < len(list(raw.glob("*.tar")))
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    main(arguments(raw, tmp_path / "a"))
    assert {path: path.stat().st_mtime_ns for path in finished} == stamps  # these were not done again
    main(arguments(raw, tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list(tmp_path.rglob("*.partial"))


def test_the_result_does_not_depend_on_the_number_of_workers(raw, tmp_path):
    main(arguments(raw, tmp_path / "one"))
    main(arguments(raw, tmp_path / "two", workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_directory_of_other_settings_is_refused_with_the_next_action(raw, tmp_path, config):
    encode([str(raw)], tmp_path, config)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"fps: None there, 12\.0 now.*Give another --out, or delete"):
        encode([str(raw)], tmp_path, replace(config, fps=12.0))
    assert contents(tmp_path) == before


def test_the_programs_explain_themselves(capsys):
    for program in ("synth", "pack", "encode", "show"):
        module = __import__(f"data_prep.{program}", fromlist=["main"])
        with pytest.raises(SystemExit, match="0"):
            module.main(["--help"])
        printed = capsys.readouterr().out
        assert "example:" in printed
        assert f"python -m data_prep.{program}" in printed


def test_help_needs_nothing_heavier_than_torch():
    heavy = ["av", "decord", "webdataset", "fsspec", "PIL", "hydra", "wandb", "transformers", "scipy", "matplotlib"]
    script = f"import sys, data_prep.encode, data_prep.show\nprint([m for m in {heavy} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"
