"""Caches of the reference trainer become our shards: bit by bit, and nothing is left out unsaid."""

import io
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep import import_precomputed as program
from data_prep.dropped import Dropped
from data_prep.import_precomputed import Dtype, ImportConfig, import_precomputed, main, read_captions
from data_prep.origin import common_first_row, known_origin
from data_prep.precomputed import list_folder, video_latents
from ltx2_train.codecs import load_audio_codec, load_video_codec
from ltx2_train.data.datasets import load_null_text, open_dataset, save_null_text
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.geometry import audio_latent_length, pixel_frames
from ltx2_train.record import Manifest, Sample, TextFeatures
from ltx2_train.testing.released import write_release
from ltx2_train.text import HashedTextEncoder

NAMES = ("unknown:vae-2.3", "unknown:audio-vae-2.3", "unknown:gemma-3")
WIDTHS = (12, 6)  # of the text features
PADDED = 32  # rows of a caption's file, where the reference has 1024
FIRST = tuple(torch.linspace(-1, 1, width).bfloat16() for width in WIDTHS)  # the row of the token that opens a caption


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def video_file(frames: int = 3, height: int = 2, width: int = 2, fps: float = 24.0, seed: int = 0) -> dict[str, Any]:
    latents = draw(128, frames, height, width, seed=seed).bfloat16()
    return {"latents": latents, "num_frames": frames, "height": height, "width": width, "fps": fps}


def audio_file(steps: int, seed: int = 0) -> dict[str, Any]:
    return {
        "latents": draw(8, steps, 16, seed=seed),
        "num_time_steps": steps,
        "frequency_bins": 16,
        "duration": steps / 25,
    }


def text_file(rows: int = 5, widths: tuple[int, int] = WIDTHS, padded: int = PADDED, seed: int = 0) -> dict[str, Any]:
    """Features of a caption of `rows` tokens, padded on the left with numbers that must not be taken over."""
    embeds = [draw(padded, width, seed=seed + place).bfloat16() for place, width in enumerate(widths)]
    for embed, first in zip(embeds, FIRST, strict=True):
        if embed.shape[1] == len(first):
            embed[padded - rows] = first
    mask = torch.zeros(padded, dtype=torch.int64)
    mask[padded - rows :] = 1
    return {"video_prompt_embeds": embeds[0], "audio_prompt_embeds": embeds[1], "prompt_attention_mask": mask}


def steps_of(frames: int, fps: float = 24.0) -> int:
    return audio_latent_length(pixel_frames(frames), fps)


class Caches:
    """A `.precomputed` folder that grows sample by sample."""

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        self.folder = dataset / ".precomputed"
        self.count = 0

    def put(self, kind: str, name: str, value: Any) -> Path:
        path = self.folder / kind / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, path)
        return path

    def add(self, name: str, **files: Any) -> None:
        """A sample with picture, sound one step too long as the reference stores it, and caption; None leaves one out."""
        self.count += 1
        seed = 100 * self.count
        given = {
            "latents": video_file(seed=seed),
            "conditions": text_file(3 + self.count, seed=seed),
            "audio_latents": audio_file(steps_of(3) + 1, seed=seed),
        }
        for kind, value in (given | files).items():
            if value is not None:
                self.put(kind, name, value)

    def load(self, kind: str, name: str) -> dict[str, Any]:
        return torch.load(self.folder / kind / f"{name}.pt", weights_only=True)


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return Caches(tmp_path / "clips")


def run(
    caches: Caches,
    out: Path,
    config: ImportConfig | None = None,
    widths: tuple[int, int] = WIDTHS,
    names: tuple[str, str, str] = NAMES,
    **options: Any,
) -> dict[str, int]:
    null = caches.dataset / "null_text.safetensors"
    save_null_text(caches.dataset, TextFeatures(*(torch.ones(1, width).bfloat16() for width in widths)))
    made_by = known_origin(caches.folder, *names, null_context=null)
    return import_precomputed(caches.folder, out, config or ImportConfig(), made_by, **options)


def samples(directory: Path) -> dict[str, Sample]:
    dataset = open_dataset(directory)
    return {sample.key: sample for sample in (dataset.read(i) for i in range(len(dataset)))}


def lines(out: Path) -> dict[str, str]:
    rows = map(json.loads, (out / "dropped.jsonl").read_text().splitlines())
    return {row["file"]: row["reason"] for row in rows}


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files if ".shards" not in path.parts}


# --- what is taken over ---


def test_latents_and_valid_text_rows_are_taken_over_bit_by_bit(caches, tmp_path):
    for name in ("a", "deep/b.x"):
        caches.add(name)
    counts = run(caches, tmp_path / "out")
    found = samples(tmp_path / "out" / "train")
    assert (counts["kept"], sorted(found)) == (2, ["a", "deep__b_x"])
    for name, sample in zip(("a", "deep/b.x"), (found["a"], found["deep__b_x"]), strict=True):
        video, text, audio = (caches.load(kind, name) for kind in ("latents", "conditions", "audio_latents"))
        valid = text["prompt_attention_mask"].bool()
        assert torch.equal(sample.video, video["latents"])
        assert torch.equal(sample.audio, audio["latents"][:, : steps_of(3)])
        assert torch.equal(sample.text.video, text["video_prompt_embeds"][valid])
        assert torch.equal(sample.text.audio, text["audio_prompt_embeds"][valid])
        assert (sample.video.dtype, sample.audio.dtype, sample.text.video.dtype) == (
            torch.bfloat16,
            torch.float32,
            torch.bfloat16,
        )
        assert (sample.fps, sample.meta["source"], sample.meta["duration"]) == (24.0, name, round(17 / 24, 6))


def test_the_dataset_says_where_it_came_from(caches, tmp_path):
    caches.add("a")
    run(caches, tmp_path / "out")
    manifest = open_dataset(tmp_path / "out" / "train").manifest
    assert (manifest.video_codec, manifest.audio_codec, manifest.text_encoder) == NAMES
    assert (manifest.video_text_width, manifest.audio_text_width, manifest.text_cache) == (*WIDTHS, "features")
    assert manifest.counts["kept"] == 1


def test_the_fingerprints_of_the_codecs_stand_in_the_manifest_where_their_files_are_given(caches, tmp_path):
    caches.add("a")
    caches.add("b")
    made_by = known_origin(caches.folder, "dct", "dct", "hashed")
    import_precomputed(caches.folder, tmp_path / "out", ImportConfig(), made_by)
    manifest = open_dataset(tmp_path / "out" / "train").manifest
    assert (manifest.video_codec, manifest.audio_codec, manifest.text_encoder) == ("dct-1", "dct-1", "hashed-1")


def test_released_components_are_known_by_their_fingerprints_and_found_again(caches, tmp_path, monkeypatch):
    release = write_release(tmp_path / "release", "2.3")
    caches.add("a")
    path = str(release.video_vae)
    with monkeypatch.context() as no_weights:
        no_weights.setattr("ltx2_train.codecs.ltx2.fill", None)
        made_by = known_origin(caches.folder, path, path, NAMES[2])
    import_precomputed(caches.folder, tmp_path / "out", ImportConfig(), made_by)
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert (manifest.video_codec, manifest.audio_codec) == (load_video_codec(path).name, load_audio_codec(path).name)
    assert manifest.settings["paths"] == {"video_codec": path, "audio_codec": path}


def test_a_name_without_a_name_is_refused(caches):
    caches.add("a")
    with pytest.raises(ConfigError, match="'unknown:' has no name"):
        known_origin(caches.folder, "unknown:", *NAMES[1:])


def test_tensors_are_cast_only_when_asked_for(caches, tmp_path):
    caches.add("a")
    run(caches, tmp_path / "out", ImportConfig(dtype=Dtype.BF16))
    [sample] = samples(tmp_path / "out" / "train").values()
    assert {t.dtype for t in (sample.video, sample.audio, sample.text.video)} == {torch.bfloat16}


def test_an_image_has_one_frame_a_second_and_no_sound(caches, tmp_path):
    caches.add("film")
    caches.add("image", latents=video_file(1, fps=1.0), audio_latents=None)
    run(caches, tmp_path / "out")
    image = samples(tmp_path / "out" / "train")["image"]
    assert (image.fps, image.bucket.signature, image.meta["duration"]) == (1.0, "v", 1.0)
    assert lines(tmp_path / "out") == {}


def test_a_folder_of_sound_alone_is_taken_over(caches, tmp_path):
    caches.add("a", latents=None, audio_latents=audio_file(40))
    run(caches, tmp_path / "out")
    [sample] = samples(tmp_path / "out" / "train").values()
    assert (sample.bucket.signature, sample.audio.shape[1], sample.fps) == ("a", 40, 25.0)


def test_a_caption_of_one_row_and_one_without_padding_are_kept_whole(caches, tmp_path):
    caches.add("short", conditions=text_file(1))
    caches.add("full", conditions=text_file(PADDED))
    run(caches, tmp_path / "out")
    assert {key: len(s.text.video) for key, s in samples(tmp_path / "out" / "train").items()} == {
        "short": 1,
        "full": PADDED,
    }


# --- older folders ---


def test_tokens_of_older_folders_come_back_on_their_grid(caches, tmp_path):
    new = video_file(3, 2, 4)
    tokens = torch.stack([new["latents"][:, f, h, w] for f in range(3) for h in range(2) for w in range(4)])
    caches.add("a", latents=new | {"latents": tokens}, audio_latents=None)
    run(caches, tmp_path / "out")
    [sample] = samples(tmp_path / "out" / "train").values()
    assert torch.equal(sample.video, new["latents"])


def test_older_folders_have_prefixed_names_and_one_embedding_for_both_streams(caches, tmp_path):
    text = text_file(4)
    old = {"prompt_embeds": text["video_prompt_embeds"], "prompt_attention_mask": text["prompt_attention_mask"]}
    caches.put("latents", "sub/latent_7", video_file())
    caches.put("conditions", "sub/condition_7", old)
    run(caches, tmp_path / "out", widths=(12, 12))
    [(key, sample)] = samples(tmp_path / "out" / "train").items()
    assert key == "sub__7"
    assert torch.equal(sample.text.video, sample.text.audio)
    assert torch.equal(sample.text.video, text["video_prompt_embeds"][-4:])


def test_a_clip_that_is_called_as_the_old_prefixes_are_keeps_its_name(caches, tmp_path):
    caches.add("latent_heat")
    run(caches, tmp_path / "out")
    assert list(samples(tmp_path / "out" / "train")) == ["latent_heat"]


# --- sound ---


@pytest.mark.parametrize(
    ("surplus", "fps", "kept", "count"),
    [
        (1, 24.0, 0, "audio_cropped"),
        (0, 24.0, 0, None),
        (7, 24.0, 0, "audio_cropped_by_more"),
        (7, 2000.0, None, "audio_cropped_by_more"),  # no step fits beside so short a picture
        (-1, 24.0, -1, "audio_ends_early"),
        (-6, 12.0, -6, "audio_ends_early"),  # 0.24 s
        (-7, 12.0, None, "audio_too_short"),
    ],
)
def test_sound_is_brought_to_the_length_of_the_picture(caches, tmp_path, surplus, fps, kept, count):
    steps = steps_of(3, fps)
    caches.add("a", latents=video_file(fps=fps), audio_latents=audio_file(steps + surplus))
    counts = run(caches, tmp_path / "out")
    [sample] = samples(tmp_path / "out" / "train").values()
    assert sample.bucket.audio_steps == (0 if kept is None else steps + kept)
    assert {name: n for name, n in counts.items() if name.startswith("audio_")} == ({count: 1} if count else {})
    is_said = count in ("audio_cropped_by_more", "audio_ends_early", "audio_too_short")
    assert lines(tmp_path / "out") == ({"a": count} if is_said else {})


def test_a_larger_tolerance_keeps_sound_that_ends_early(caches, tmp_path):
    caches.add("a", latents=video_file(fps=12.0), audio_latents=audio_file(steps_of(3, 12.0) - 7))
    run(caches, tmp_path / "out", ImportConfig(audio_tolerance=0.3))
    [sample] = samples(tmp_path / "out" / "train").values()
    assert sample.bucket.audio_steps == steps_of(3, 12.0) - 7


# --- what is inconsistent ---


def test_samples_that_lack_a_file_are_named(caches, tmp_path):
    caches.add("whole")
    caches.add("wordless", conditions=None)
    caches.add("blind", latents=None)
    caches.add("silent", audio_latents=None)
    counts = run(caches, tmp_path / "out")
    assert lines(tmp_path / "out") == {"wordless": "no_conditions", "blind": "no_latents", "silent": "no_audio"}
    assert set(samples(tmp_path / "out" / "train")) == {"whole", "silent"}
    assert (counts["samples"], counts["kept"], counts["dropped_no_latents"], counts["no_audio"]) == (4, 2, 1, 1)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"latents": video_file() | {"fps": None}}, "no_fps"),
        ({"latents": video_file() | {"fps": float("nan")}}, "no_fps"),
        ({"latents": {k: v for k, v in video_file().items() if k != "fps"}}, "no_fps"),
        ({"latents": video_file() | {"num_frames": 4}}, "wrong_shape"),
        ({"latents": video_file() | {"height": 64}}, "wrong_shape"),
        ({"latents": video_file() | {"latents": draw(64, 3, 2, 2)}}, "wrong_shape"),
        ({"latents": video_file() | {"latents": draw(12, 128), "width": 3}}, "wrong_shape"),
        ({"latents": video_file() | {"latents": video_file()["latents"] * torch.inf}}, "not_finite"),
        ({"latents": video_file() | {"latents": torch.zeros(1).expand(128, 3, 2, 2)}}, "corrupt"),
        ({"latents": video_file() | {"latents": draw(128, 3, 2, 2).to(torch.float8_e4m3fn)}}, "corrupt"),
        ({"latents": video_file() | {"latents": draw(128, 3, 2, 2).to_sparse()}}, "corrupt"),
        ({"latents": video_file() | {"latents": torch.ones(128, 3, 2, 2, dtype=torch.int64)}}, "corrupt"),
        ({"latents": {"video": 1}}, "corrupt"),
        ({"latents": [1, 2]}, "corrupt"),
        ({"audio_latents": audio_file(19) | {"num_time_steps": 18}}, "wrong_shape"),
        ({"audio_latents": {"latents": draw(128, 19)}}, "wrong_shape"),
        ({"conditions": text_file(5, (12, 8))}, "other_text_width"),
        ({"conditions": text_file() | {"prompt_attention_mask": torch.zeros(PADDED)}}, "no_text_rows"),
        ({"conditions": text_file() | {"prompt_attention_mask": torch.full((PADDED,), 2)}}, "wrong_mask"),
        ({"conditions": text_file() | {"prompt_attention_mask": torch.ones(PADDED - 1)}}, "wrong_shape"),
        ({"conditions": text_file() | {"audio_prompt_embeds": torch.full((PADDED, 6), torch.nan)}}, "not_finite"),
    ],
)
def test_a_sample_that_contradicts_itself_is_dropped_by_name(caches, tmp_path, files, reason):
    for name in ("a", "b"):
        caches.add(name)
    caches.add("bad", **files)
    counts = run(caches, tmp_path / "out")
    assert (counts["kept"], counts[f"dropped_{reason}"]) == (2, 1)
    assert lines(tmp_path / "out") == {"bad": reason}


def test_a_rate_that_is_missing_can_be_given(caches, tmp_path):
    caches.add("a", latents=video_file() | {"fps": None})
    caches.add("b")
    run(caches, tmp_path / "out", ImportConfig(fps=12.0))
    assert {key: s.fps for key, s in samples(tmp_path / "out" / "train").items()} == {"a": 12.0, "b": 24.0}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "old"])
def test_damaged_files_are_found(caches, tmp_path, damage):
    caches.add("a")
    caches.add("bad")
    path = caches.folder / "latents" / "bad.pt"
    whole = bytearray(path.read_bytes())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x40  # inside the latents: torch.load takes it for what was stored
    torch.save(video_file(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    bytes_of = {
        "cut": whole[: len(whole) // 2],
        "flipped": flipped,
        "empty": b"",
        "text": b"latents",
        "old": (tmp_path / "old.pt").read_bytes()[:-40],
    }
    path.write_bytes(bytes_of[damage])
    run(caches, tmp_path / "out")
    assert lines(tmp_path / "out") == {"bad": "corrupt"}


def test_no_damage_goes_by_unnoticed(tmp_path):
    draws, whole = random.Random(0), io.BytesIO()
    torch.save(video_file(1, 1, 1), whole)
    path, outcomes = tmp_path / "a.pt", set()
    for _ in range(150):
        damaged = bytearray(whole.getvalue())
        for _ in range(draws.choice((1, 3, 20))):
            damaged[draws.randrange(len(damaged))] = draws.randrange(256)
        path.write_bytes(damaged[: draws.choice((len(damaged), draws.randrange(len(damaged))))])
        try:
            latents, fps = video_latents(path, None)
        except Dropped as error:
            outcomes.add(error.reason)
        else:  # what changed was a name or padding
            assert torch.equal(latents, video_file(1, 1, 1)["latents"])
            assert fps == 24.0
    assert outcomes == {"corrupt"}


def test_no_file_can_run_code(caches, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    caches.add("a")
    caches.add("bad")
    (caches.folder / "conditions" / "bad.pt").write_bytes(pickle.dumps({"prompt_embeds": Attack()}, protocol=2))
    torch.save({"latents": Attack()}, caches.folder / "latents" / "bad.pt")
    run(caches, tmp_path / "out")
    assert lines(tmp_path / "out") == {"bad": "corrupt"}
    assert not (tmp_path / "attacked").exists()


def test_two_files_of_one_sample_are_named_and_the_first_is_taken(caches, tmp_path):
    caches.add("a/b")
    caches.add("a__b")
    caches.put("latents", "latent_c", video_file(2))
    caches.put("conditions", "condition_c", text_file())
    caches.add("c", audio_latents=None)
    run(caches, tmp_path / "out")
    found = samples(tmp_path / "out" / "train")
    assert sorted(found) == ["a__b", "c"]
    assert found["a__b"].meta["source"] == "a/b"
    assert found["c"].video.shape[1] == 3
    duplicates = {Path(name).stem for name, reason in lines(tmp_path / "out").items() if reason == "duplicate_name"}
    assert duplicates == {"a__b", "latent_c", "condition_c"}


def test_references_and_masks_are_not_left_out_unsaid(caches, tmp_path):
    caches.add("a")
    for kind in ("reference_latents", "video_masks"):
        caches.put(kind, "a", {"mask": torch.ones(1)})
    (caches.folder / "latents" / "notes.txt").write_text("x")
    counts = run(caches, tmp_path / "out")
    assert {name: n for name, n in counts.items() if name.startswith("files_not")} == {
        "files_not_imported_(reference_latents/)": 1,
        "files_not_imported_(video_masks/)": 1,
        "files_not_imported_(latents/)": 1,
    }


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"need conditions/ beside latents/ or audio_latents/"):
        list_folder(tmp_path)


def test_a_folder_of_which_nothing_is_left_is_an_error_that_names_the_list(caches, tmp_path):
    caches.add("a", latents=video_file() | {"fps": None})
    with pytest.raises(DataError, match=r"nothing was kept.*dropped_no_fps.*dropped\.jsonl"):
        run(caches, tmp_path / "out")


@pytest.mark.parametrize(
    "setting", [{"fps": 0.0}, {"audio_tolerance": -1.0}, {"holdout": 1.0}, {"samples_per_shard": 0}]
)
def test_settings_out_of_bounds_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        ImportConfig(**setting)


# --- captions and splits ---


def test_captions_come_from_the_metadata_file(caches, tmp_path):
    for name in ("a", "deep/b", "c"):
        caches.add(name)
    metadata = caches.dataset / "metadata.jsonl"
    rows = [
        {"video": "a.mp4", "caption": " a ball ", "reference_video": "r.mp4"},
        {"media_path": str(caches.dataset / "deep" / "b.mov"), "caption": "a bell"},
        {"video": "gone.mp4", "caption": "nothing"},
    ]
    metadata.write_text("\n".join(map(json.dumps, rows)))
    counts = run(caches, tmp_path / "out", captions=read_captions(metadata))
    found = samples(tmp_path / "out" / "train")
    assert {key: (s.caption, s.meta["source"]) for key, s in found.items()} == {
        "a": ("a ball", "a.mp4"),
        "deep__b": ("a bell", "deep/b.mov"),
        "c": ("", "c"),
    }
    assert (counts["without_caption"], counts["captions_not_used"]) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"video": "a.mp4", "caption": "x"}, {"video": "a.png", "caption": "y"}],
            "'a.png' and 'a.mp4' have the same key",
        ),
        ([{"caption": "x"}], "row 1: none of video, media_path and audio"),
    ],
)
def test_metadata_that_leaves_open_whose_caption_it_is_are_refused(tmp_path, rows, message):
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        read_captions(tmp_path / "metadata.json")


def test_a_share_of_the_samples_is_held_out_by_name(caches, tmp_path):
    for i in range(12):
        caches.add(f"clip{i}", latents=video_file(1, 1, 1), audio_latents=None)
    counts = run(caches, tmp_path / "out", ImportConfig(holdout=0.4, samples_per_shard=5))
    train, held_out = (set(samples(tmp_path / "out" / split)) for split in ("train", "heldout"))
    assert not train & held_out
    assert (len(train), len(held_out)) == (counts["kept_train"], counts["kept_heldout"])
    assert len(train | held_out) == 12
    assert held_out


# --- null context ---


def test_the_null_context_is_the_first_row_that_all_captions_share(caches):
    for name in ("a", "b", "c"):
        caches.add(name)
    null = known_origin(caches.folder, *NAMES).text.null
    assert torch.equal(null.video, FIRST[0][None])
    assert torch.equal(null.audio, FIRST[1][None])


def features(*rows: Tensor, width: int = 6) -> TextFeatures:
    video = torch.stack(rows)
    return TextFeatures(video, video[:, :width])


def test_no_null_context_is_read_out_of_captions_that_do_not_show_it():
    first, other = draw(12, seed=1), draw(12, seed=2)
    assert common_first_row([features(first, other), features(first, -other)]) is not None
    assert common_first_row([features(first, other), features(first, other)]) is None  # one caption, however often
    assert common_first_row([features(first, other), features(other, first)]) is None
    assert common_first_row([features(first, other, width=12), features(first, -other, width=12)]) is None  # as in 2.0
    assert common_first_row([]) is None


def test_a_null_context_that_is_not_known_has_no_row_and_can_be_added_without_importing_again(caches, tmp_path, caplog):
    caches.add("a")
    unknown = known_origin(caches.folder, *NAMES)
    first = import_precomputed(caches.folder, tmp_path / "out", ImportConfig(), unknown)
    directory = tmp_path / "out" / "train"
    assert "caption dropout and guidance away from the empty caption cannot be used" in caplog.text
    assert "--text-encoder" not in caplog.text  # another name is another dataset: it cannot be added
    assert Manifest.load(directory).settings["null_context_rows"] == len(load_null_text(directory).video) == 0
    changed = (directory / "shard-000000.tar").stat().st_mtime_ns
    torch.save(text_file(1), tmp_path / "empty.pt")
    save_null_text(tmp_path, TextFeatures(*(first[None] for first in FIRST)))
    for path in (tmp_path / "empty.pt", tmp_path / "null_text.safetensors"):
        made_by = known_origin(caches.folder, *NAMES, null_context=path)
        assert import_precomputed(caches.folder, tmp_path / "out", ImportConfig(), made_by) == first
        assert torch.equal(open_dataset(directory).null_text.video, FIRST[0][None])
    assert (directory / "shard-000000.tar").stat().st_mtime_ns == changed


def test_the_text_encoder_gives_the_null_context_where_the_folder_does_not_show_it(caches):
    caches.add("a", conditions=text_file(5, (12, 12)))
    null = known_origin(caches.folder, *NAMES[:2], "hashed").text.null
    assert (null.video.shape, null.audio.shape) == ((1, 12), (1, 12))


def test_one_row_is_asked_of_the_text_encoder_in_bf16_where_it_is_told_to_run(caches, tmp_path, monkeypatch):
    def build(name, *widths, **options):
        asked.update(options)
        return HashedTextEncoder(*widths)

    asked: dict[str, Any] = {}
    monkeypatch.setattr("ltx2_train.text.build_text_encoder", build)
    caches.add("a", conditions=text_file(5, (12, 12)))
    known_origin(caches.folder, *NAMES[:2], "gemma", "weights", device="cuda:1")
    assert asked == {"weights": "weights", "device": "cuda:1", "dtype": torch.bfloat16}


def test_a_null_context_of_another_text_encoder_is_refused(caches, tmp_path):
    caches.add("a")
    save_null_text(tmp_path, TextFeatures(torch.zeros(1, 8), torch.zeros(1, 8)))
    with pytest.raises(ConfigError, match=r"null context of widths \(8, 8\); the text features .* have \(12, 6\)"):
        known_origin(caches.folder, *NAMES, null_context=tmp_path / "null_text.safetensors")


def test_the_widths_are_those_of_most_captions(caches, tmp_path):
    caches.add("a", conditions=text_file(3, (20, 10)))
    for name in ("b", "c"):
        caches.add(name)
    run(caches, tmp_path / "out")
    assert lines(tmp_path / "out") == {"a": "other_text_width"}


# --- killed and continued ---


def test_a_killed_import_goes_on_and_ends_with_the_same_bytes(caches, tmp_path, monkeypatch):
    for i in range(7):
        caches.add(f"clip{i}")
    config = ImportConfig(samples_per_shard=3, holdout=0.3)
    run(caches, tmp_path / "straight", config)
    done: list[str] = []
    read = program.read_sample

    def killed(row, work, notes):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(row.entry.name)
        return read(row, work, notes)

    monkeypatch.setattr(program, "read_sample", killed)
    with pytest.raises(KeyboardInterrupt):
        run(caches, tmp_path / "killed", config)
    assert not (tmp_path / "killed" / "train" / "manifest.json").exists()
    monkeypatch.setattr(program, "read_sample", lambda *given: done.append(given[0].entry.name) or read(*given))
    run(caches, tmp_path / "killed", config)
    assert len(done) == 4 + 4  # the first shard of three is not done again
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_file_that_changed_is_imported_again_and_other_settings_are_refused(caches, tmp_path):
    for name in ("a", "b"):
        caches.add(name)
    run(caches, tmp_path / "out", ImportConfig(samples_per_shard=1))
    path = caches.put("latents", "b", video_file(seed=999))
    os.utime(path, ns=(1, 1))
    run(caches, tmp_path / "out", ImportConfig(samples_per_shard=1))
    found = samples(tmp_path / "out" / "train")
    assert torch.equal(found["b"].video, video_file(seed=999)["latents"])
    with pytest.raises(ConfigError, match="dtype: keep there, fp32 now"):
        run(caches, tmp_path / "out", ImportConfig(samples_per_shard=1, dtype=Dtype.FP32))
    with pytest.raises(ConfigError, match="video_codec: unknown:vae-2.3 there, unknown:vae-2.0 now"):
        run(caches, tmp_path / "out", ImportConfig(samples_per_shard=1), names=("unknown:vae-2.0", *NAMES[1:]))


def test_workers_give_the_same_bytes(caches, tmp_path):
    for i in range(4):
        caches.add(f"clip{i}")
    config = ImportConfig(samples_per_shard=2)
    run(caches, tmp_path / "one", config)
    run(caches, tmp_path / "two", config, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# --- size ---


@pytest.mark.parametrize(("widths", "generation"), [((4096, 2048), "2.3"), ((3840, 3840), "2.0")])
def test_a_sample_takes_at_most_three_tenths_of_its_caches(caches, tmp_path, widths, generation):
    """A clip of 960 x 544 x 89 with sound, its caption of 120 tokens padded to 1024 as the reference stores it."""
    frames, height, width = 12, 17, 30
    video, audio = video_file(frames, height, width), audio_file(steps_of(frames) + 1)
    caches.add("a", latents=video, audio_latents=audio, conditions=text_file(120, widths, 1024))
    run(caches, tmp_path / "out", widths=widths)
    before = sum(path.stat().st_size for path in caches.folder.rglob("*.pt"))
    after = sum(path.stat().st_size for path in (tmp_path / "out" / "train").glob("*.tar"))
    print(f"{generation}: {before:,} -> {after:,} bytes, {after / before:.3f}")
    assert after <= 0.3 * before


# --- the program ---


def test_the_program_ends_with_a_table_and_the_list(caches, tmp_path, capsys):
    caches.add("a")
    caches.add("b")
    caches.add("bad", latents=video_file() | {"fps": None})
    names = ["--video-codec", NAMES[0], "--audio-codec", NAMES[1], "--text-encoder", NAMES[2]]
    main([str(caches.dataset), "--out", str(tmp_path / "out"), "--workers", "1", *names])
    printed = capsys.readouterr().out
    assert "dropped no fps" in printed
    assert "bytes of shards" in printed
    assert str(tmp_path / "out" / "dropped.jsonl") in printed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_language_model_gives_the_first_token_the_same_states_in_every_padded_caption(dtype):
    """What reading the null context out of captions rests on, shown on a tiny Gemma 3 of random weights."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    model = (
        Gemma3TextModel(Gemma3TextConfig(vocab_size=64, num_hidden_layers=7, sliding_window=8, **sizes))
        .to(dtype)
        .eval()
    )
    captions = [[2], [2, 9, 11, 12], [2, *range(20, 48)]]  # 2 opens each; the first is the empty one
    ids = torch.tensor([[0] * (PADDED - len(tokens)) + tokens for tokens in captions])
    mask = torch.tensor([[0] * (PADDED - len(tokens)) + [1] * len(tokens) for tokens in captions])
    with torch.no_grad():
        states = [model(ids[i : i + 1], attention_mask=mask[i : i + 1], output_hidden_states=True) for i in range(3)]
    first = [
        torch.stack([layer[0, PADDED - len(tokens)] for layer in state.hidden_states])
        for state, tokens in zip(states, captions, strict=True)
    ]
    assert len(first[0]) == 8
    print(dtype, max(float((row.float() - first[0].float()).abs().max()) for row in first[1:]))
    torch.testing.assert_close(first[1], first[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first[2], first[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_null_context_of_the_folder_is_what_the_text_encoder_gives_for_the_empty_caption(caches, tmp_path):
    from ltx2_train.text import build_text_encoder
    from tests.unit.text.tiny_gemma import write_gemma

    gemma = write_gemma(tmp_path / "gemma")
    weights = write_release(tmp_path / "release", "2.3").text_projection
    encoder = build_text_encoder(gemma, weights=weights)
    captions = ["a red ball falls", "rain over the dark floor , waves and birds"]
    for caption, text in zip(captions, encoder.encode(captions), strict=True):
        padding = PADDED - len(text.video)
        embeds = [torch.cat([torch.full((padding, rows.shape[1]), 9.0), rows]) for rows in (text.video, text.audio)]
        mask = torch.tensor([0] * padding + [1] * len(text.video))
        names = ("video_prompt_embeds", "audio_prompt_embeds", "prompt_attention_mask")
        caches.add(caption[:5], conditions=dict(zip(names, (*embeds, mask), strict=True)))
    known = known_origin(caches.folder, *NAMES[:2], str(gemma), str(weights))
    null, [empty] = known.text.null, encoder.encode([""])
    assert known.text.name == encoder.name
    torch.testing.assert_close(null.video, empty.video, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(null.audio, empty.audio, rtol=1e-5, atol=1e-5)
    assert common_first_row([*encoder.encode(captions)]) is not None
