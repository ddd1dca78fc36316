"""Requests: what is read from files, what is refused in which words, what is made again, and who makes what."""

import json
import re
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.errors import ConfigError
from ltx2_train.evals.planning import Ground, State, plan, share
from ltx2_train.evals.receipts import media_of, read_receipt, receipt_path
from ltx2_train.evals.requests import Asked, ClipRequest, check_names, expanded, read_requests
from ltx2_train.media.write import write_mp4, write_png, write_wav
from ltx2_train.model.modality import Stream
from tests.unit.media.media_files import FPS, click_waveform, ramp_frames

SIZE = {"frames": 17, "width": 64, "height": 32, "fps": 24.0}
PROFILE = SamplerProfile(name="few", steps=4)
GROUND = Ground(
    identity={"model": "one"}, streams=frozenset(Stream), size=lambda: SIZE, profile=lambda request: PROFILE
)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder with a picture, a second of sound, a film of 25 frames, and a file that is none of them."""
    folder = tmp_path_factory.mktemp("given")
    write_png(folder / "ball.png", ramp_frames(1)[0])
    write_wav(folder / "second.wav", click_waveform(1.0), 16000)
    write_mp4(folder / "film.mp4", ramp_frames(25), FPS)
    (folder / "broken.png").write_bytes(b"\x89PNG and nothing more")
    (folder / "table.csv").write_text("video,caption\n" * 50)
    return folder


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def planned(tmp_path: Path, ground: Ground = GROUND, **fields):
    """The one clip of a request, or the reason why there is none."""
    clips, outcomes = plan(expanded("here", {"prompt": "a ball", **fields}), ground, tmp_path)
    return clips[0] if clips else outcomes[0].detail


# -- reading ---


def test_jsonl_yaml_and_json_say_the_same(tmp_path):
    entries = [
        {"prompt": "a ball", "seed": 3, "audio": "x.wav"},
        {"prompt": "two", "format": ["wav", "mp4"], "count": 2},
    ]
    lines = written(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, entries)))
    listed = written(tmp_path, "a.json", json.dumps(entries, indent=1))
    text = "# a comment\n- prompt: a ball\n  seed: 3\n  audio: x.wav\n- {prompt: two, format: [wav, mp4], count: 2}\n"
    read = [[a.request for a in read_requests(p, {})] for p in (lines, listed, written(tmp_path, "a.yaml", text))]
    assert read[0] == read[1] == read[2]
    assert [request.seed for request in read[0]] == [3, 0, 1], "count goes up from the seed"
    assert read[0][0].audio == str(tmp_path / "x.wav"), "beside the file of requests"


def test_options_hold_for_requests_that_do_not_say_otherwise(tmp_path):
    path = written(tmp_path, "a.jsonl", '{"prompt": "one"}\n{"prompt": "two", "steps": 9}\n')
    found = read_requests(path, {"steps": 5, "fps": 24, "audio": "y.wav"})
    assert [a.request.steps for a in found] == [5, 9]
    assert found[0].request.audio == "y.wav", "an option's file lies where the option says"
    assert [a.where for a in found] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"promt": "b"}',
            r"a.jsonl:2: unknown field 'promt'; did you mean prompt[?]?[.] The fields: prompt, negative",
        ),
        ("a.yaml", "- prompt: a\n- prompt: b\n  stepz: 3", r"a.yaml:3: unknown field 'stepz'; did you mean steps"),
        ("a.jsonl", '{"seed": 1}', "a.jsonl:1: a request without a prompt"),
        ("a.jsonl", '{"prompt": " "}', "a.jsonl:1: prompt: empty"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt"', "a.jsonl:3: no JSON"),
        ("a.jsonl", '["a"]', "a.jsonl:1: .* is no request"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', "a.jsonl:1: no JSON .'prompt' stands twice"),
        ("a.yaml", "- prompt: a\n  prompt: b", "a.yaml:1: a field stands twice"),
        ("a.yaml", "prompt: a", "no list of requests"),
        ("a.yaml", "- just text", "a.yaml:1: 'just text' is no request"),
        ("a.yaml", "- {prompt: [", "no YAML"),
        ("a.jsonl", "", "no requests in it"),
        ("a.txt", "a ball", "requests come as .jsonl, .yaml"),
        ("a.jsonl", '{"prompt": "a", "frames": "many"}', "a.jsonl:1: frames='many': must be a whole number"),
        ("a.jsonl", '{"prompt": "a", "frames": true}', "frames=True: must be a whole number"),
        ("a.jsonl", '{"prompt": "a", "seed": null}', "seed=None: must be a whole number"),
        ("a.jsonl", '{"prompt": 5}', "prompt=5: must be a text"),
        ("a.jsonl", '{"prompt": "a", "silent": 1}', "silent=1: must be true or false"),
        ("a.jsonl", '{"prompt": "a", "format": "gif"}', "format='gif': not known; choose one of mp4, wav, png"),
        ("a.jsonl", '{"prompt": "a", "format": []}', "format: empty"),
        ("a.jsonl", '{"prompt": "a", "count": 0}', "count=0: must be >= 1"),
        ("a.jsonl", '{"prompt": "a", "fps": 0}', "fps=0: must be > 0"),
        ("a.jsonl", '{"prompt": "a", "name": "../x"}', "name='../x': must be a file name without folders"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "half \\ud83d"}', r"a.jsonl:2: prompt: letter 6 is '.ud83d'"),
        ("a.jsonl", '{"prompt": "a", "name": "x\\u0000"}', "a.jsonl:1: name=.* a NUL"),
        ("a.jsonl", '{"prompt": "a", "audio": "x\\u0000"}', "a.jsonl:1: audio=.* a NUL"),
        ("a.jsonl", f'{{"prompt": "a", "name": "{"x" * 250}"}}', "takes 252 bytes with its seed; must be <= 230"),
        ("a.jsonl", '{"prompt": "a", "audio": "a", "video": "v"}', "video and audio: they exclude each other"),
        ("a.jsonl", '{"prompt": "a", "image": "a", "video": "v"}', "video and image: they exclude each other"),
        ("a.jsonl", '{"prompt": "a", "video": "v", "silent": true}', "video and silent: they exclude"),
        ("a.jsonl", '{"prompt": "a", "image_crf": 33}', r"image_crf=33: must be in .0, 51., and beside an image"),
        ("a.jsonl", '{"prompt": "a", "fit": true}', "fit: there is nothing to cut the frames to"),
        ("a.jsonl", '{"prompt": "a", "silent": true, "format": "wav"}', "format=wav: a silent clip has no sound"),
    ],
)
def test_what_is_no_request_is_refused_with_its_line(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        read_requests(written(tmp_path, name, text), {})


def test_a_line_ends_where_json_says_so(tmp_path):
    """JSON allows what Unicode calls ends of lines inside of strings."""
    prompts = ["one\u2028two", "one\u0085two", "one\u2029two"]
    text = "\r\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    assert [one.request.prompt for one in read_requests(written(tmp_path, "a.jsonl", text), {})] == prompts


def test_options_about_files_hold_for_requests_that_name_such_files(tmp_path):
    entries = [{}, {"audio": "a.wav"}, {"image": "i.png"}]
    lines = written(tmp_path, "a.jsonl", "\n".join(json.dumps({"prompt": "a", **entry}) for entry in entries))
    read = [one.request for one in read_requests(lines, {"fit": True, "image_crf": 33})]
    assert [(request.fit, request.image_crf) for request in read] == [(False, None), (True, None), (False, 33)]


def test_formats_between_commas_are_those_of_a_list(tmp_path):
    lines = written(tmp_path, "a.jsonl", '{"prompt": "a", "format": "mp4, png"}\n{"prompt": "b", "format": "wav"}')
    assert [one.request.format for one in read_requests(lines, {})] == [["mp4", "png"], ["wav"]]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.jsonl: cannot be read"):
        read_requests(tmp_path / "none.jsonl", {})


def test_clips_that_would_share_their_files_are_refused():
    asked = [Asked(f"line {i}", ClipRequest(prompt=text)) for i, text in enumerate(["a ball", "another", "A BALL!"])]
    with pytest.raises(ConfigError, match="line 2: its files would be called 'a-ball-0', as those of line 0"):
        check_names(asked)
    check_names([asked[0], asked[1], Asked("line 2", replace(asked[2].request, seed=1))])


def test_long_prompts_that_begin_alike_have_names_of_their_own():
    long = "a red ball bounces on a dark blue floor and then " * 3
    first, second = (ClipRequest(prompt=long + end).file_name for end in ("rolls", "stops"))
    assert first != second
    assert max(len(first), len(second)) < 80
    assert first == ClipRequest(prompt=long + "rolls").file_name


# -- planning ---


def test_sizes_come_from_the_model_and_the_frame_rate_of_a_given_film_from_that(tmp_path, media):
    clip = planned(tmp_path, height=64)
    assert (clip.frames, clip.request.width, clip.request.height, clip.fps) == (17, 64, 64, 24.0)
    assert clip.request.format == ["mp4"]
    write_mp4(tmp_path / "slow.mp4", ramp_frames(25), 12)
    assert planned(tmp_path, video=str(tmp_path / "slow.mp4")).fps == 12.0
    assert planned(tmp_path, video=str(tmp_path / "slow.mp4"), fps=24).fps == 24


def test_the_size_is_not_asked_for_where_it_is_given(tmp_path):
    def never() -> dict:
        raise AssertionError("the data were opened")

    assert planned(tmp_path, replace(GROUND, size=never), **SIZE).bucket.video_tokens == 3 * 1 * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 16}, "nearest: 17"),
        ({"width": 60}, "width of 60 px; .*nearest: 64"),
        ({"frames": 9, "fps": 200}, "latent steps: 1, must be >= 2.*Ask for 17 frames or more, or for silent"),
        ({"frames": 9, "fps": 1000}, "latent steps: 0, must be >= 2.*Ask for 65 frames or more, or for silent"),
        ({"frames": 1, "format": ["wav"]}, "latent steps: 1, must be >= 2.*Ask for 9 frames or more$"),
        ({"frames": 1, "audio": "second.wav"}, "too short for sound.*Ask for 9 frames or more$"),
        ({"frames": 1, "video": "film.mp4"}, "too short for sound.*Ask for 9 frames or more$"),
        ({"image": "none.png"}, "^image=.*none.png: no such file"),
        ({"image": "broken.png"}, "^image=.*broken.png: damaged image"),
        ({"image": "table.csv"}, r"^image=[^']*table.csv: damaged or no media file \([^']*\).* image takes png, jpg"),
        ({"audio": "table.csv"}, "^audio=.*table.csv: damaged or no media file.* audio takes any sound .*wav, flac"),
        ({"image": "second.wav"}, "second.wav: no picture in it.* image takes png"),
        ({"audio": "ball.png"}, "^audio=.*ball.png: no sound in it"),
        ({"video": "ball.png"}, "^video=.*ball.png: a still picture, and the clip has 17 frames. Give it as image"),
        ({"audio": "film.mp4"}, "film.mp4: no sound in it"),
        ({"image": "ball.png", "frames": 1}, "the only frame of the clip"),
        (
            {"audio": "second.wav", "frames": 41},
            "1.71 s, and 0.71 s of sound are missing. Ask for frames=17, or for fit",
        ),
        ({"video": "film.mp4", "frames": 33}, "it has 25 frames at that rate. Ask for frames=25, or for fit"),
    ],
)
def test_a_clip_that_cannot_be_made_is_told_with_the_bound_and_the_next_action(tmp_path, media, fields, message):
    placed = {k: str(media / v) if k in ("image", "audio", "video") else v for k, v in fields.items()}
    reason = planned(tmp_path, **placed)
    assert isinstance(reason, str), reason
    assert re.search(message, reason), reason


def test_fit_cuts_the_frames_to_what_is_given(tmp_path, media):
    assert planned(tmp_path, audio=str(media / "second.wav"), frames=41, fit=True).frames == 17
    assert planned(tmp_path, video=str(media / "film.mp4"), frames=33, fit=True).frames == 25
    assert planned(tmp_path, video=str(media / "film.mp4"), frames=9, fit=True).frames == 9, "it never makes it longer"
    with wave.open(str(tmp_path / "tick.wav"), "wb") as file:  # 10 ms: not one frame
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(np.zeros(160, dtype="<i2").tobytes())
    assert "Give a longer file" in planned(tmp_path, audio=str(tmp_path / "tick.wav"), fps=1, fit=True)


def test_a_model_with_one_stream_is_asked_for_that_alone(tmp_path, media):
    video = replace(GROUND, streams=frozenset({Stream.video}))
    clip = planned(tmp_path, video)
    assert (clip.has_video, clip.has_audio, clip.bucket.audio_steps) == (True, False, 0)
    assert "this model was trained to make video alone" in planned(tmp_path, video, audio=str(media / "second.wav"))
    assert "this model was trained to make video alone" in planned(tmp_path, video, video=str(media / "film.mp4"))
    assert "format=wav: this model was trained to make video alone" in planned(tmp_path, video, format=["wav"])
    assert planned(tmp_path, video, image=str(media / "ball.png")).has_video
    sound = replace(GROUND, streams=frozenset({Stream.audio}), size=lambda: {"frames": 25, "fps": 25.0})
    clip = planned(tmp_path, sound)
    assert (clip.has_video, clip.bucket.signature, clip.request.format) == (False, "a", ["wav"])
    assert "image" in planned(tmp_path, sound, image=str(media / "ball.png"))
    assert "nothing would be left" in planned(tmp_path, sound, silent=True)
    few = planned(tmp_path, sound, frames=1, fps=50.0)
    assert few.endswith("Ask for 3 frames or more"), "without pictures any number of frames will do"


def test_one_frame_is_a_silent_picture_unless_sound_is_asked_for(tmp_path, media):
    clip = planned(tmp_path, frames=1)
    assert (clip.has_video, clip.has_audio, clip.request.silent, clip.request.format) == (True, False, True, ["mp4"])
    assert clip.digest == planned(tmp_path, frames=1, silent=True).digest
    for asked in ({"format": ["png", "wav"]}, {"audio": str(media / "second.wav")}, {"video": str(media / "film.mp4")}):
        assert planned(tmp_path, frames=1, fps=10.0, **asked).bucket.audio_steps == 2, "a long frame has room for sound"
    assert planned(tmp_path, frames=9).has_audio


def test_one_that_fails_leaves_the_others(tmp_path):
    asked = [Asked(str(i), ClipRequest(prompt=f"p{i}", width=33 if i == 1 else 32)) for i in range(3)]
    clips, outcomes = plan(asked, GROUND, tmp_path)
    assert [clip.where for clip in clips] == ["0", "2"]
    assert [(o.where, o.state) for o in outcomes] == [("1", State.failed)]


# -- what is there already ---


def test_a_given_file_that_would_be_written_over_is_refused(tmp_path, media):
    sound = tmp_path / "drum-0.wav"
    sound.write_bytes((media / "second.wav").read_bytes())
    fields = {"name": "drum", "audio": str(sound), "fit": True}
    assert re.search("drum-0.wav: there already, and no receipt", planned(tmp_path, **fields, format=["wav"]))
    assert planned(tmp_path, **fields).files == ["drum-0.mp4"], "of other names than what is given"


def test_a_given_file_that_the_same_command_makes_anew_is_refused(tmp_path, media):
    """A film that was made before, of which the one clip is made again and the other is to get its sound."""
    film = tmp_path / "dog-0.mp4"
    film.write_bytes((media / "film.mp4").read_bytes())
    (tmp_path / "dog-0.json").write_text(json.dumps({"digest": "former", "files": {film.name: film.stat().st_size}}))
    asked = [*expanded("one", {"prompt": "a", "name": "dog"}), *expanded("two", {"prompt": "b", "video": str(film)})]
    [clip], [outcome] = plan(asked, GROUND, tmp_path)
    assert (clip.where, outcome.where, outcome.state) == ("one", "two", State.failed)
    assert "a file that this command writes (one)" in outcome.detail
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path)
    for path in (film, linked / film.name):
        detail = planned(tmp_path, name="dog", video=str(path), format=["wav"])
        assert "a file that this command writes (here)" in detail, "also where only its removal would harm it"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("shard-0/precious.tar", {"format": ["png"]}),
        ("shard-0", {"format": ["png"]}),
        ("shard-0.mp4", {}),
        ("shard-0.json", {}),
    ],
)
def test_what_no_earlier_clip_left_is_not_touched(tmp_path, path, fields):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text('{"files": {}}')
    detail = planned(tmp_path, name="shard", **fields)
    assert isinstance(detail, str)
    assert f"{tmp_path / path}: there already" in detail
    assert not isinstance(planned(tmp_path, name="other", **fields), str)


def test_a_folder_that_a_clip_does_not_write_is_no_matter(tmp_path):
    (tmp_path / "shard-0").mkdir()
    assert planned(tmp_path, name="shard").files == ["shard-0.mp4"]


def test_a_receipt_gives_no_leave_to_remove_what_is_no_media_of_the_clip(tmp_path):
    files = ["../a.mp4", "b-0.mp4", "a-0.mp4", "a-0.wav", "a-0/00001.png", "a-0/../x.png", "a-0.txt"]
    (tmp_path / "a-0.json").write_text(json.dumps({"digest": "", "files": dict.fromkeys(files, 1)}))
    assert media_of(tmp_path, "a-0") == ["a-0.mp4", "a-0.wav", "a-0/00001.png"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is no directory"):
        planned(tmp_path / "file" / "sub")


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u4e2d", "\U00020000"])
def test_names_of_long_prompts_are_names_of_files(tmp_path, letter):
    name = ClipRequest(prompt=letter * 300).file_name
    (tmp_path / f".{name}.mp4.12345678.partial").write_text("")
    assert name != ClipRequest(prompt=letter * 301).file_name


# -- receipts ---


def leave_receipt(directory: Path, clip) -> None:
    (directory / "media").write_bytes(b"1234")
    receipt_path(directory, clip.name).write_text(json.dumps({"digest": clip.digest, "files": {"media": 4}}))


def test_a_clip_that_is_there_is_not_made_again_and_a_changed_one_is(tmp_path, media):
    shutil_image = tmp_path / "first.png"
    shutil_image.write_bytes((media / "ball.png").read_bytes())
    fields = {"image": str(shutil_image), "steps": 5}
    leave_receipt(tmp_path, planned(tmp_path, **fields))
    [], [outcome] = plan(expanded("here", {"prompt": "a ball", **fields}), GROUND, tmp_path)
    assert (outcome.state, outcome.detail) == (State.there, str(tmp_path / "a-ball-0.mp4"))
    changes = [
        planned(tmp_path, **fields, width=96),
        planned(tmp_path, **fields | {"steps": 6}),
        planned(tmp_path, **fields, negative="dark"),
        planned(tmp_path, **fields, format=["mp4", "png"]),
        planned(tmp_path, replace(GROUND, identity={"model": "two"}), **fields),
        planned(tmp_path, replace(GROUND, profile=lambda request: replace(PROFILE, steps=5)), **fields),
    ]
    assert not [clip for clip in changes if isinstance(clip, str)], "all are made again"
    write_png(shutil_image, ramp_frames(2)[1])
    assert not isinstance(planned(tmp_path, **fields), str), "another picture under the same name"


def test_a_receipt_whose_files_are_not_whole_does_not_count(tmp_path):
    clip = planned(tmp_path)
    assert read_receipt(tmp_path, clip.name, clip.digest) is None
    leave_receipt(tmp_path, clip)
    assert read_receipt(tmp_path, clip.name, clip.digest) is not None
    (tmp_path / "media").write_bytes(b"12")
    assert read_receipt(tmp_path, clip.name, clip.digest) is None
    leave_receipt(tmp_path, clip)
    receipt_path(tmp_path, clip.name).write_text("{")
    assert read_receipt(tmp_path, clip.name, clip.digest) is None


# -- sharing ---


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_clip_is_made_once_in_batches_of_one_kind(tmp_path, num_ranks, batch_size):
    sizes = [(9, 32), (9, 32), (17, 32), (9, 64), (9, 32), (9, 32), (17, 32)]
    asked = [Asked(str(i), ClipRequest(prompt=f"p{i}", frames=f, width=w)) for i, (f, w) in enumerate(sizes)]
    clips, _ = plan(asked, GROUND, tmp_path)
    ranks = share(clips, batch_size, num_ranks)
    assert len(ranks) == num_ranks
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(clip.where for batch in batches for clip in batch.clips) == [str(i) for i in range(7)]
    assert all(len(batch.clips) <= batch_size and len({clip.bucket for clip in batch.clips}) == 1 for batch in batches)


def test_the_work_is_even(tmp_path):
    asked = [Asked(str(i), ClipRequest(prompt=f"p{i}", frames=129 if i == 0 else 17)) for i in range(9)]
    clips, _ = plan(asked, GROUND, tmp_path)
    first, second = share(clips, 16, 2)
    assert [clip.where for batch in first for clip in batch.clips] == ["0"], "the long one alone"
    assert len([clip for batch in second for clip in batch.clips]) == 8
