"""Files become raw records; what does not is named with its reason."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data_prep.buckets import parse_buckets
from data_prep.dropped import EmptyCaption
from data_prep.pack import PackConfig, main, pack
from data_prep.rows import clip_key
from data_prep.tars import file_sha256, read_tar
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import probe
from ltx2_train.media.video import read_video
from ltx2_train.media.write import write_flac, write_mp4
from tests.unit.media.media_files import (
    FPS,
    RATE,
    click_waveform,
    encode_frames,
    encode_sound,
    flip_bits,
    ramp_frames,
)


def records(out: Path) -> dict[str, dict[str, bytes]]:
    return {key: members for shard in sorted(out.glob("*.tar")) for key, members in read_tar(str(shard))}


def dropped(out: Path) -> dict[str, str]:
    lines = (out / "dropped.jsonl").read_text().splitlines()
    return {row["file"]: row["reason"] for row in map(json.loads, lines)}


def write_metadata(folder: Path, rows: list[dict]) -> Path:
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_that_fit_are_stored_byte_for_byte(world, raw):
    packed = records(raw)
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    assert len(packed) == len(rows) == 14
    for row in rows:
        members = packed[clip_key(row["video"])]
        assert members[row["video"][-3:]] == (world.parent / row["video"]).read_bytes()
        meta = json.loads(members["json"])
        assert (meta["caption"], meta["source"]) == (row["caption"], row["video"])
        assert meta["truth"]["impact_times"] == row["impact_times"]


def test_the_listing_holds_the_hashes_of_the_shards(raw):
    listing = json.loads((raw / "pack.json").read_text())
    assert listing["shards"] == {path.name: file_sha256(str(path)) for path in raw.glob("*.tar")}
    assert listing["counts"] == {"files": 14, "kept": 14}


def test_every_bad_file_is_dropped_and_named_with_its_reason(folder, tmp_path, clip, capsys):
    content = clip.read_bytes()
    (folder / "good.mp4").write_bytes(content)
    (folder / "cut.mp4").write_bytes(content[: len(content) * 2 // 3])
    (folder / "flipped.mp4").write_bytes(flip_bits(content))
    (folder / "text.mp4").write_text("not a film")
    (folder / "silent.mp4").write_bytes(encode_frames(tmp_path / "s.mp4", ramp_frames()).read_bytes())
    encode_frames(folder / "short.mp4", ramp_frames(5))
    (folder / "uncaptioned.mp4").write_bytes(content + b"")
    names = ["good", "cut", "flipped", "text", "silent", "short", "uncaptioned", "gone"]
    rows = [{"video": f"{n}.mp4", "caption": "" if n == "uncaptioned" else n} for n in names]
    metadata, out = write_metadata(folder, rows), tmp_path / "out"
    main([str(metadata), "--out", str(out), "--buckets", "64x64x9", "--workers", "1"])
    assert dropped(out) == {
        "cut.mp4": "truncated",
        "flipped.mp4": "corrupt",
        "text.mp4": "corrupt",
        "short.mp4": "too_short",
        "uncaptioned.mp4": "empty_caption",
        "gone.mp4": "missing_file",
    }
    assert sorted(records(out)) == ["good", "silent"]
    printed = capsys.readouterr().out
    for line in ("kept", "dropped truncated", "dropped corrupt", "dropped too short", "dropped empty caption"):
        assert line in printed
    assert "dropped.jsonl" in printed


def test_an_empty_caption_is_kept_where_that_is_asked_for(folder, tmp_path, clip):
    (folder / "a.mp4").write_bytes(clip.read_bytes())
    counts = pack(folder, tmp_path / "out", PackConfig(empty_caption=EmptyCaption.KEEP))
    assert counts == {"files": 1, "kept": 1}
    assert json.loads(records(tmp_path / "out")["a"]["json"])["caption"] == ""


def test_a_folder_takes_captions_from_text_files_and_sound_of_the_same_name(folder, tmp_path, clip):
    (folder / "deep").mkdir()
    (folder / "deep" / "a.mp4").write_bytes(clip.read_bytes())
    (folder / "deep" / "a.txt").write_text("a ramp\n")
    write_flac(folder / "deep" / "a.flac", click_waveform(), RATE)
    counts = pack(folder, tmp_path / "out", PackConfig())
    assert counts["kept"] == 1
    members = records(tmp_path / "out")["deep__a"]
    assert set(members) == {"mp4", "flac", "json"}
    assert json.loads(members["json"])["caption"] == "a ramp"


def test_a_long_file_becomes_consecutive_segments_that_lose_nothing(folder, tmp_path):
    frames = ramp_frames(28)
    write_mp4(folder / "long.mp4", frames, FPS, click_waveform(28 / FPS), RATE, crf=4)
    metadata = write_metadata(folder, [{"video": "long.mp4", "caption": "x"}])
    counts = pack(metadata, tmp_path / "out", PackConfig(max_seconds=0.5))
    packed = records(tmp_path / "out")
    assert sorted(packed) == ["long-0000", "long-0001", "long-0002"]
    assert counts == {"files": 1, "kept": 3, "files_cut_or_resampled": 1}
    video = np.concatenate([read_video(packed[k]["mp4"])[0].numpy() for k in sorted(packed)], axis=1)
    assert video.shape == (3, 28, 48, 64)
    assert np.abs(video - read_video(folder / "long.mp4")[0].numpy()).mean() < 0.02
    sound = np.concatenate([read_audio(packed[k]["flac"])[0].numpy() for k in sorted(packed)], axis=1)
    whole = read_audio(folder / "long.mp4", duration=28 / FPS)[0].numpy()
    assert np.abs(sound[:, : whole.shape[1]] - whole[:, : sound.shape[1]]).max() < 1e-5
    assert [json.loads(packed[k]["json"])["start"] for k in sorted(packed)] == [0.0, 0.5, 1.0]


def test_a_file_that_fails_while_it_is_cut_is_dropped_and_the_others_are_kept(folder, tmp_path, clip):
    (folder / "bad.mp4").write_bytes(flip_bits(clip.read_bytes()))
    (folder / "good.mp4").write_bytes(clip.read_bytes())
    rows = [{"video": f"{name}.mp4", "caption": "x"} for name in ("bad", "good")]
    config = PackConfig(max_seconds=0.5, decode=False)
    counts = pack(write_metadata(folder, rows), tmp_path / "out", config)
    assert dropped(tmp_path / "out") == {"bad.mp4": "corrupt"}
    assert counts["dropped_corrupt"] == 1
    assert {"good-0000", "good-0001", "good-0002"} <= set(records(tmp_path / "out"))


def test_a_remainder_that_is_too_short_is_counted(folder, tmp_path):
    write_mp4(folder / "long.mp4", ramp_frames(28), FPS)
    metadata = write_metadata(folder, [{"video": "long.mp4", "caption": "x"}])
    config = PackConfig(max_seconds=0.5, buckets=parse_buckets("64x64x9"))
    assert pack(metadata, tmp_path / "out", config)["remainder_frames"] == 4


def test_varying_frame_times_become_constant(folder, tmp_path):
    stamps = np.cumsum([0, *([400, 800, 1800] * 8)]).tolist()
    encode_frames(folder / "v.mp4", ramp_frames(), stamps=stamps, base=Fraction(1, 24000))
    metadata = write_metadata(folder, [{"video": "v.mp4", "caption": "x"}])
    counts = pack(metadata, tmp_path / "out", PackConfig())
    assert counts["variable_frame_rate"] == 1
    [members] = records(tmp_path / "out").values()
    info = probe(members["mp4"])
    assert not info.is_variable
    assert info.fps == pytest.approx(24, rel=0.01)
    assert json.loads(members["json"])["variable_frame_rate"] is True


def test_sound_alone_is_packed(folder, tmp_path):
    write_flac(folder / "a.flac", click_waveform(1.3), RATE)
    metadata = write_metadata(folder, [{"audio": "a.flac", "caption": "clicks"}])
    assert pack(metadata, tmp_path / "out", PackConfig())["kept"] == 1
    pack(metadata, tmp_path / "cut", PackConfig(max_seconds=0.5))
    packed = records(tmp_path / "cut")
    lengths = [read_audio(packed[k]["flac"])[0].shape[1] for k in sorted(packed)]
    assert sum(lengths) == pytest.approx(1.3 * RATE, abs=2)


def test_the_end_of_sound_is_told_where_a_segment_is_padded(folder, tmp_path):
    write_mp4(folder / "a.mp4", ramp_frames(24), FPS, click_waveform(0.7), RATE)
    metadata = write_metadata(folder, [{"video": "a.mp4", "caption": "x"}])
    pack(metadata, tmp_path / "out", PackConfig(max_seconds=0.5))
    packed = records(tmp_path / "out")
    assert json.loads(packed["a-0001"]["json"])["audio_end"] == pytest.approx(0.2, abs=0.03)


def test_a_changed_file_is_packed_anew_and_others_are_not(folder, tmp_path, clip):
    for name in ("a", "b"):
        (folder / f"{name}.mp4").write_bytes(clip.read_bytes())
        (folder / f"{name}.txt").write_text(name)
    out, config = tmp_path / "out", PackConfig(clips_per_shard=1)
    pack(folder, out, config)
    before = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    (folder / "b.txt").write_text("another caption")
    pack(folder, out, config)
    after = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_shards_of_files_that_are_gone_vanish_only_where_that_is_asked_for(folder, tmp_path, clip):
    for name in ("a", "b"):
        (folder / f"{name}.mp4").write_bytes(clip.read_bytes())
        (folder / f"{name}.txt").write_text(name)
    arguments = [str(folder), "--out", str(tmp_path / "out"), "--clips-per-shard", "1", "--workers", "1"]
    main(arguments)
    (folder / "b.mp4").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar"):
        main(arguments)
    assert sorted(records(tmp_path / "out")) == ["a", "b"]
    main([*arguments, "--replace"])
    assert sorted(records(tmp_path / "out")) == ["a"]


def test_another_folder_does_not_overwrite_what_is_packed(tmp_path, clip):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.mp4").write_bytes(clip.read_bytes())
        (tmp_path / name / f"{name}.txt").write_text(name)
    pack(tmp_path / "a", tmp_path / "out", PackConfig())
    with pytest.raises(DataError, match=r"out holds shards that are not made from this input: shard-000000\.tar"):
        pack(tmp_path / "b", tmp_path / "out", PackConfig())
    assert sorted(records(tmp_path / "out")) == ["a"]


# --- sound of its own, and files that are left out ---


def test_the_picture_stays_where_the_sound_comes_from_another_clip(folder, tmp_path, clip):
    (folder / "seen.mp4").write_bytes(encode_frames(tmp_path / "m.mp4", ramp_frames()[::-1]).read_bytes())
    (folder / "heard.mp4").write_bytes(clip.read_bytes())
    rows = [{"video": "seen.mp4", "audio": "heard.mp4", "caption": "x"}]
    pack(write_metadata(folder, rows), tmp_path / "out", PackConfig())
    [members] = records(tmp_path / "out").values()
    assert set(members) == {"mp4", "flac", "json"}
    assert members["mp4"] == (folder / "seen.mp4").read_bytes()
    whole, _ = read_audio(clip)
    assert np.abs(read_audio(members["flac"])[0].numpy() - whole.numpy()).max() < 1e-6


@pytest.mark.parametrize(("name", "codec"), [("a.wave", "pcm_s16le"), ("a.mka", "flac"), ("a.aiff", "pcm_s16be")])
def test_sound_of_an_unusual_suffix_is_stored_as_flac(folder, tmp_path, clip, name, codec):
    (folder / "a.mp4").write_bytes(clip.read_bytes())
    suffix = ".wav" if name == "a.wave" else Path(name).suffix
    encode_sound(tmp_path / f"s{suffix}", click_waveform(), codec=codec).rename(folder / name)
    rows = [{"video": "a.mp4", "audio": name, "caption": "x"}]
    pack(write_metadata(folder, rows), tmp_path / "out", PackConfig())
    [members] = records(tmp_path / "out").values()
    assert set(members) == {"mp4", "flac", "json"}
    sound = read_audio(members["flac"])[0].numpy()
    assert np.abs(sound - click_waveform()[:, : sound.shape[1]]).max() < 1e-4


def test_gaps_of_sound_that_becomes_flac_are_told(folder, tmp_path):
    encode_sound(folder / "a.mka", click_waveform(3.0), codec="flac", hole=(0.5, 2.0))
    metadata = write_metadata(folder, [{"audio": "a.mka", "caption": "x"}])
    for seconds, gaps in ((20, {"a": [0.5, 2.0]}), (1.5, {"a-0000": [0.5, 1.5], "a-0001": [0.0, 0.5]})):
        pack(metadata, tmp_path / f"{seconds}", PackConfig(max_seconds=seconds))
        packed = records(tmp_path / f"{seconds}")
        assert set(packed) == set(gaps)
        for key, gap in gaps.items():
            assert json.loads(packed[key]["json"])["audio_gaps"] == [pytest.approx(gap, abs=0.1)]


def test_shards_that_are_packed_into_the_folder_itself_are_no_files_of_it(folder, clip):
    (folder / "a.mp4").write_bytes(clip.read_bytes())
    (folder / "a.txt").write_text("a ramp")
    counts = [pack(folder, folder / "raw", PackConfig()) for _ in range(2)]
    assert counts == [{"files": 1, "kept": 1}] * 2


def test_a_video_that_encoding_would_not_recognise_is_refused(folder, tmp_path, clip):
    (folder / "a.film").write_bytes(clip.read_bytes())
    pack(write_metadata(folder, [{"video": "a.film", "caption": "x"}]), tmp_path / "out", PackConfig())
    assert dropped(tmp_path / "out") == {"a.film": "unknown_suffix"}


def test_every_file_of_a_folder_is_kept_or_named(folder, tmp_path, clip):
    for name in ("a.mp4", "b.wmv", "latin.mp4", ".hidden.mp4"):
        (folder / name).write_bytes(clip.read_bytes())
    for name in ("a.txt", "b.txt", "z.txt"):
        (folder / name).write_text("\ufeffa ramp", encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "metadata.csv").write_text("video,caption\n")
    for suffix in ("flac", "wav"):
        encode_sound(folder / f"z.{suffix}", click_waveform(), codec="flac" if suffix == "flac" else "pcm_s16le")
    counts = pack(folder, tmp_path / "out", PackConfig())
    assert dropped(tmp_path / "out") == {
        "b.wmv": "unknown_suffix",
        "latin.mp4": "caption_unreadable",
        "z.wav": "shadowed_audio",
    }
    packed = records(tmp_path / "out")
    assert {key: json.loads(members["json"])["caption"] for key, members in packed.items()} == {
        "a": "a ramp",
        "z": "a ramp",
    }
    assert counts["files"] == counts["kept"] + 3 == 5
    assert "latin.txt" in (tmp_path / "out" / "dropped.jsonl").read_text()


@pytest.mark.parametrize("field", [{"max_seconds": 0}, {"min_seconds": 30}, {"clips_per_shard": 0}])
def test_settings_out_of_bounds_are_refused_by_name(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        PackConfig(**field)
