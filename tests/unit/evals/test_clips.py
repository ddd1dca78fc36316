"""Clips: what is given stays what it was, what fails leaves the others alone, and nothing half made is believed."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltx2_train.codecs import build_audio_codec, build_video_codec
from ltx2_train.codecs.residence import at_work
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.evals import clips as clips_module
from ltx2_train.evals.clips import ClipMaker
from ltx2_train.evals.planning import Batch, Ground, State, plan
from ltx2_train.evals.receipts import read_receipt
from ltx2_train.evals.requests import expanded
from ltx2_train.evals.samples import Codecs
from ltx2_train.media.audio import read_audio
from ltx2_train.media.probe import probe
from ltx2_train.media.video import read_video, to_frames
from ltx2_train.media.write import PARTIAL, write_mp4, write_png, write_wav
from ltx2_train.model.modality import Stream, Velocity
from ltx2_train.record import TextFeatures
from tests.unit.evals.locked import locked
from tests.unit.media.media_files import FPS, click_waveform, ramp_frames

SIZE = {"frames": 17, "width": 64, "height": 32, "fps": 24.0}
CPU = torch.device("cpu")


class EmptyTexts(dict):
    def __missing__(self, text: str) -> TextFeatures:
        return TextFeatures(torch.zeros(1, 4), torch.zeros(1, 4))


def to_zero(video, audio, perturbations=None):
    """Takes all noise to the mean of the data: velocity = latent, as if sigma were 1."""
    return Velocity(*(None if stream is None else stream.latent for stream in (video, audio)))


def to_nan(video, audio, perturbations=None):
    return Velocity(*(None if stream is None else stream.latent * torch.nan for stream in (video, audio)))


@pytest.fixture(scope="module")
def codecs() -> Codecs:
    return Codecs(build_video_codec("dct"), build_audio_codec("dct"))


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    noise = np.random.default_rng(0).integers(0, 255, (40, 100, 3), dtype=np.uint8)
    write_png(folder / "picture.png", noise)
    write_wav(folder / "sound.wav", click_waveform(2.0, rate=32000), 32000)
    write_wav(folder / "odd.wav", click_waveform(2.0, rate=18000, channels=1), 18000)
    write_mp4(folder / "film.mp4", ramp_frames(25, height=48, width=100), FPS)
    return folder


@pytest.fixture
def latents(monkeypatch) -> list:
    """Requests and latents of everything that is generated."""
    seen = []

    def recorded(model, requests, profile, **more):
        seen.append((requests, generate(model, requests, profile, **more)))
        return seen[-1][1]

    generate = clips_module.generate
    monkeypatch.setattr(clips_module, "generate", recorded)
    return seen


def planned(directory: Path, *requests: dict) -> Batch:
    profile = SamplerProfile(name="two", steps=2, schedule="shifted")
    ground = Ground(identity={}, streams=frozenset(Stream), size=lambda: SIZE, profile=lambda request: profile)
    asked = [one for i, fields in enumerate(requests) for one in expanded(str(i), {"prompt": f"p{i}", **fields})]
    clips, failed = plan(asked, ground, directory)
    assert not failed, failed
    return Batch(tuple(clips))


def made(directory: Path, codecs: Codecs, *requests: dict, model=to_zero):
    batch = planned(directory, *requests)
    return batch.clips, list(ClipMaker(model, codecs, EmptyTexts(), directory, device=CPU).make(batch))


def test_a_given_sound_is_what_the_model_hears_and_what_is_written(tmp_path, codecs, media, latents):
    (clip,), (progress,) = made(tmp_path, codecs, {"audio": str(media / "sound.wav"), "format": ["mp4", "wav"]})
    assert progress.outcome.state == State.made
    waveform, rate = read_audio(media / "sound.wav", duration=clip.bucket.audio_steps / 25)
    [(_, generated)] = latents
    assert torch.equal(generated.audio[0], codecs.audio.encode(waveform[None], rate)[0])
    written, written_rate = read_audio(tmp_path / f"{clip.name}.wav")
    assert (written_rate, written.shape[1]) == (32000, round(17 / 24 * 32000)), "as long as the picture"
    assert (written - waveform[:, : written.shape[1]]).abs().max() < 1e-4
    info = probe(tmp_path / f"{clip.name}.mp4")
    assert (info.frames, info.sample_rate, info.audio_end) == (17, 32000, pytest.approx(17 / 24, abs=0.03))


def test_sound_of_a_rate_that_mp4_does_not_know_is_written_all_the_same(tmp_path, codecs, media):
    (clip,), _ = made(tmp_path, codecs, {"audio": str(media / "odd.wav")})
    info = probe(tmp_path / f"{clip.name}.mp4")
    assert (info.sample_rate, info.channels) == (48000, 2)


def test_a_given_film_is_what_the_model_sees_and_what_is_written(tmp_path, codecs, media, latents):
    (clip,), _ = made(tmp_path, codecs, {"video": str(media / "film.mp4"), "format": ["png", "mp4"]})
    pixels, _ = read_video(media / "film.mp4", frames=17, size=(64, 32))
    [(_, generated)] = latents
    assert torch.equal(generated.video[0], codecs.video.encode(pixels[None])[0])
    assert not torch.equal(generated.audio, torch.zeros_like(generated.audio))
    for place, frame in enumerate(to_frames(pixels)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / clip.name / f"{place:05d}.png")), frame), "sharp"
    assert probe(tmp_path / f"{clip.name}.mp4").has_audio


def test_a_given_picture_is_the_first_frame(tmp_path, codecs, media, latents):
    made(tmp_path, codecs, {"image": str(media / "picture.png")})
    pixels, _ = read_video(media / "picture.png", frames=1, size=(64, 32))
    [(_, generated)] = latents
    frame = codecs.video.encode(pixels[None])[0]
    assert torch.equal(generated.video[0, :, :1], frame)
    assert not torch.equal(generated.video[0, :, 1:2], frame)


@pytest.mark.parametrize(("field", "name"), [("image", "picture.png"), ("audio", "sound.wav"), ("video", "film.mp4")])
def test_a_file_that_changes_before_it_is_read_makes_no_clip(tmp_path, codecs, media, field, name):
    """Its receipt would vouch for the file that was there when the requests were read."""
    given, out = Path(shutil.copy(media / name, tmp_path)), tmp_path / "out"
    batch = planned(out, {field: str(given)}, {})
    if field == "image":
        write_png(given, np.full((40, 100, 3), 255, np.uint8))
    elif field == "audio":
        shutil.copy(media / "odd.wav", given)
    else:
        write_mp4(given, ramp_frames(25, height=48, width=100)[::-1], FPS)
    told = {p.outcome.where: p.outcome for p in ClipMaker(to_zero, codecs, EmptyTexts(), out, device=CPU).make(batch)}
    assert [told[where].state for where in ("0", "1")] == [State.failed, State.made]
    assert told["0"].detail.startswith(f"{field}={given}: changed since the requests were read")
    assert not [path for path in files(out) if batch.clips[0].name in path]


@pytest.mark.parametrize("name", ["video", "audio"])
def test_a_codec_that_gives_no_numbers_makes_no_clip(tmp_path, codecs, name):
    class Broken:
        def __getattr__(self, other):
            return getattr(getattr(codecs, name), other)

        def decode(self, latents):
            return getattr(codecs, name).decode(latents) * torch.nan

    broken = dataclasses.replace(codecs, **{name: Broken()})
    _, (progress,) = made(tmp_path, broken, {})
    assert progress.outcome.detail.startswith(f"the {name} codec gave NaN or infinity")
    assert files(tmp_path) == []


def test_a_picture_may_be_made_as_coarse_as_a_frame_of_a_film(tmp_path, codecs, media, latents):
    picture = str(media / "picture.png")
    made(tmp_path, codecs, *({"image": picture} | more for more in ({}, {"image_crf": 0}, {"image_crf": 33})))
    [([plain, fine, coarse], _)] = latents
    near, far = ((x.first_frame - plain.first_frame).square().mean() for x in (fine, coarse))
    assert 0 < near < far


def test_a_clip_does_not_depend_on_its_batch(tmp_path, codecs, media, latents):
    """Given sound beside given pictures, and other seeds."""
    few = {"frames": 9, "format": ["wav"]}
    requests = [
        few | more
        for more in ({"audio": str(media / "sound.wav")}, {"seed": 5}, {"image": str(media / "picture.png"), "seed": 2})
    ]
    made(tmp_path, codecs, *requests)
    [(_, together)] = latents
    for place, fields in enumerate(requests):
        made(tmp_path / "alone", codecs, fields)
        alone = latents[-1][1]
        torch.testing.assert_close(together.video[place], alone.video[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(together.audio[place], alone.audio[0], atol=1e-6, rtol=0)


def test_one_that_cannot_be_read_leaves_its_batch_alone(tmp_path, codecs, media):
    picture = tmp_path / "gone.png"
    picture.write_bytes((media / "picture.png").read_bytes())
    batch = planned(tmp_path, {}, {"image": str(picture)}, {})
    picture.write_bytes(b"\x89PNG and nothing more")
    outcomes = [p.outcome for p in ClipMaker(to_zero, codecs, EmptyTexts(), tmp_path, device=CPU).make(batch)]
    assert sorted((o.where, o.state.value) for o in outcomes) == [("0", "made"), ("1", "failed"), ("2", "made")]
    failed = next(o.detail for o in outcomes if o.state == State.failed)
    assert failed.startswith(f"image={picture}: damaged image"), "with the field that names it"


def test_nothing_is_written_of_latents_with_nan(tmp_path, codecs):
    _, (progress,) = made(tmp_path, codecs, {}, model=to_nan)
    assert (progress.outcome.state, list(tmp_path.iterdir())) == (State.failed, [])
    assert "NaN" in progress.outcome.detail


class LongTexts(EmptyTexts):
    """One prompt is longer than the model takes."""

    def __missing__(self, text: str) -> TextFeatures:
        rows = 9 if text == "p1" else 1
        return TextFeatures(torch.zeros(rows, 4), torch.zeros(rows, 4))


@pytest.mark.parametrize(
    ("error", "told"), [(ValueError("too long"), "too long"), (torch.OutOfMemoryError("CUDA"), "too little memory")]
)
def test_one_that_cannot_be_sampled_leaves_its_batch_alone(tmp_path, codecs, monkeypatch, error, told):
    """A prompt that is too long for the model, or too much for the device, in a batch of three."""

    def limited(model, requests, profile, **more):
        if any(len(request.text.video) > 1 for request in requests):
            raise error
        return generate(model, requests, profile, **more)

    generate = clips_module.generate
    monkeypatch.setattr(clips_module, "generate", limited)
    batch = planned(tmp_path, {}, {}, {})
    outcomes = [p.outcome for p in ClipMaker(to_zero, codecs, LongTexts(), tmp_path, device=CPU).make(batch)]
    assert sorted((o.where, o.state.value) for o in outcomes) == [("0", "made"), ("1", "failed"), ("2", "made")]
    assert told in next(o.detail for o in outcomes if o.state == State.failed)


def test_passes_of_guidance_run_together_as_far_as_the_memory_goes(tmp_path, codecs, monkeypatch, caplog):
    """A device that holds one pass of one clip: the clip is made all the same, as with --passes-at-once 1."""
    guided = SamplerProfile(name="cfg", steps=2, schedule="shifted", video=GuidanceConfig(cfg=3.0))
    rows = []

    def small(video, audio, perturbations=None):
        rows.append(len(video.latent))
        if rows[-1] > 1:
            raise torch.OutOfMemoryError("CUDA")
        return to_zero(video, audio)

    clips = [dataclasses.replace(clip, profile=guided) for clip in planned(tmp_path, {}).clips]
    maker = ClipMaker(small, codecs, EmptyTexts(), tmp_path, device=CPU)
    [progress] = maker.make(Batch(tuple(clips)))
    assert (progress.outcome.state, rows) == (State.made, [2, 1, 1, 1, 1]), "two passes in each of two steps"
    assert "one by one" in caplog.text


def test_a_given_sound_is_written_to_the_end_of_the_clip(tmp_path, codecs, media, latents):
    """17 frames at 30 per second are 0.567 s; the latent steps of their sound cover 0.560 s."""
    sound = {"audio": str(media / "sound.wav"), "fps": 30.0, "format": ["wav"]}
    (clip,), _ = made(tmp_path, codecs, sound)
    waveform, rate = read_audio(media / "sound.wav", duration=0.56)
    assert torch.equal(latents[0][1].audio[0], codecs.audio.encode(waveform[None], rate)[0]), "what the model hears"
    assert read_audio(tmp_path / f"{clip.name}.wav")[0].shape[1] == round(17 / 30 * 32000)


def test_a_model_that_breaks_fails_every_clip_of_the_batch(tmp_path, codecs):
    def breaks(*arguments):
        raise RuntimeError("a kernel")

    _, progress = made(tmp_path, codecs, {}, {}, model=breaks)
    assert [p.outcome.detail for p in progress] == ["RuntimeError: a kernel"] * 2


def broken(times: int):
    """Writes JSON so many times, then the disk is full."""
    left = iter(range(times))

    def write(path, values):
        if next(left, None) is None:
            raise OSError("no space left")
        write_json(path, values)

    write_json = clips_module.write_json
    return write


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_the_receipt_comes_last_and_a_remade_clip_leaves_nothing_of_the_former(tmp_path, codecs, monkeypatch):
    (clip,), _ = made(tmp_path, codecs, {"format": ["png", "wav"]})
    assert read_receipt(tmp_path, clip.name, clip.digest) is not None
    begun = tmp_path / f".{clip.name}{PARTIAL}" / "media" / "x.wav"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"begun and killed")
    with monkeypatch.context() as patch:
        patch.setattr(clips_module, "write_json", broken(1))
        (shorter,), (progress,) = made(tmp_path, codecs, {"frames": 9, "format": ["png"]})
    assert "no space left" in progress.outcome.detail
    assert read_receipt(tmp_path, shorter.name, shorter.digest) is None
    pictures = [f"{clip.name}/{i:05d}.png" for i in range(9)]
    assert files(tmp_path) == [f".{clip.name}{PARTIAL}/files.json", *pictures], "what it placed is listed"
    made(tmp_path, codecs, {"frames": 9, "format": ["png"]})
    assert read_receipt(tmp_path, shorter.name, shorter.digest) is not None
    assert files(tmp_path) == [f"{clip.name}.json", *pictures]
    made(tmp_path, codecs, {"frames": 9, "format": ["wav"]})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{clip.name}.json", f"{clip.name}.wav"]


@pytest.mark.parametrize("failing", ["model", "disk"])
def test_a_clip_that_cannot_be_made_anew_leaves_the_former(tmp_path, codecs, monkeypatch, failing):
    (clip,), _ = made(tmp_path, codecs, {"format": ["mp4", "wav"]})
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    if failing == "disk":
        monkeypatch.setattr(clips_module, "write_json", broken(0))
    model = to_nan if failing == "model" else to_zero
    _, (progress,) = made(tmp_path, codecs, {"frames": 9, "format": ["wav"]}, model=model)
    assert progress.outcome.state == State.failed
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert read_receipt(tmp_path, clip.name, clip.digest) is not None


def test_a_clip_that_another_command_writes_is_left_to_it_and_the_others_are_made(tmp_path, codecs):
    (theirs, _), _ = made(tmp_path, codecs, {"format": ["wav"]}, {"format": ["wav"]})
    batch = planned(tmp_path, {"format": ["wav"], "frames": 9}, {"format": ["wav"], "frames": 9})
    place = tmp_path / f".{theirs.name}{PARTIAL}"
    (place / "media").mkdir(parents=True)
    (place / "media" / "of-the-other.wav").write_bytes(b"being written")
    before = (tmp_path / f"{theirs.name}.wav").read_bytes()
    with locked(place):
        done = list(ClipMaker(to_zero, codecs, EmptyTexts(), tmp_path, device=CPU).make(batch))
    assert [p.outcome.state for p in done] == [State.failed, State.made]
    assert done[0].outcome.detail.startswith("another command writes it (process 7 on host-a)")
    assert (place / "media" / "of-the-other.wav").read_bytes() == b"being written"
    assert (tmp_path / f"{theirs.name}.wav").read_bytes() == before
    (again,) = ClipMaker(to_zero, codecs, EmptyTexts(), tmp_path, device=CPU).make(Batch(batch.clips[:1]))
    assert again.outcome.state == State.made, "what that command left when it was killed is no obstacle"
    assert not place.exists()


def test_what_failed_is_told_though_its_folder_is_gone(tmp_path, codecs, monkeypatch):
    def fails(folder, clip, *media):
        shutil.rmtree(folder.parent)
        raise OSError("no space left")

    monkeypatch.setattr(clips_module, "write_clip", fails)
    _, (progress,) = made(tmp_path, codecs, {})
    assert progress.outcome.detail == "OSError: no space left"
    assert list(tmp_path.iterdir()) == []


def test_what_came_there_while_a_clip_was_sampled_is_left(tmp_path, codecs):
    batch = planned(tmp_path, {"format": ["wav"]})
    path = tmp_path / f"{batch.clips[0].name}.wav"
    path.write_bytes(b"of someone else")
    (progress,) = ClipMaker(to_zero, codecs, EmptyTexts(), tmp_path, device=CPU).make(batch)
    assert (progress.outcome.state, path.read_bytes()) == (State.failed, b"of someone else")


def test_silence_and_sound_alone_are_written_as_asked(tmp_path, codecs):
    (silent,), _ = made(tmp_path, codecs, {"silent": True})
    assert not probe(tmp_path / f"{silent.name}.mp4").has_audio
    (sound,), _ = made(tmp_path, codecs, {"format": ["wav"], "seed": 1})
    assert not (tmp_path / f"{sound.name}.mp4").exists()
    assert probe(tmp_path / f"{sound.name}.wav").has_audio


class Moving:
    """A codec that notes where it lies."""

    def __init__(self, codec) -> None:
        self.codec, self.places, self.sample_rate = codec, [], getattr(codec, "sample_rate", 0)

    def to(self, device) -> None:
        self.places.append(str(device))

    def encode(self, *arguments):
        assert self.places[-1] == "cpu:0"
        return self.codec.encode(*arguments)

    def decode(self, latents):
        assert self.places[-1] == "cpu:0"
        return self.codec.decode(latents)


def test_codecs_are_on_the_device_only_while_they_work(tmp_path, codecs, media):
    video, audio = Moving(codecs.video), Moving(codecs.audio)
    moving = dataclasses.replace(codecs, video=video, audio=audio)

    def model(*streams):
        assert {video.places[-1], *audio.places[-1:]} == {"cpu"}, "a codec lies beside the working model"
        return to_zero(*streams)

    device = torch.device("cpu", 0)
    batch = planned(tmp_path, {"image": str(media / "picture.png")})
    (progress,) = ClipMaker(model, moving, EmptyTexts(), tmp_path, device=device).make(batch)
    assert progress.outcome.state == State.made, progress.outcome.detail
    assert video.places == ["cpu:0", "cpu"] * 2, "the first frame, then the film"
    assert audio.places == ["cpu:0", "cpu"]


def test_codecs_leave_the_device_when_their_work_fails(codecs):
    codec = Moving(codecs.video)
    with pytest.raises(ZeroDivisionError), at_work(torch.device("cpu", 0), codec):
        raise ZeroDivisionError
    assert codec.places == ["cpu:0", "cpu"]
