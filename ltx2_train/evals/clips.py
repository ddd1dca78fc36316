"""Clips made of requests: what is given is read and encoded, the rest is sampled, decoded and written."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.codecs.resample import resample, to_stereo
from ltx2_train.codecs.residence import at_work
from ltx2_train.diffusion.generate import Generated, Request, generate
from ltx2_train.diffusion.profiles import SamplerProfile
from ltx2_train.distributed.lock import lock_alone
from ltx2_train.errors import DataError, Ltx2Error
from ltx2_train.evals.files import write_json
from ltx2_train.evals.planning import LATENT_STEP, Batch, Clip, Outcome, State, check_contents
from ltx2_train.evals.receipts import begun_path, check_free, media_of, receipt_path
from ltx2_train.evals.requests import OutputFormat
from ltx2_train.evals.samples import Codecs
from ltx2_train.media.audio import read_audio
from ltx2_train.media.video import VideoFile, read_video, to_frames, to_tensor
from ltx2_train.media.write import AAC_RATES, write_mp4, write_png, write_wav
from ltx2_train.record import TextFeatures

logger = logging.getLogger(__name__)

Frames = NDArray[np.uint8]  # (F, H, W, 3)


@dataclass(frozen=True, slots=True)
class Sound:
    """Stereo sound (2, N) in [-1, 1]."""

    waveform: Tensor
    rate: int  # Hz

    def cut(self, seconds: float) -> "Sound":
        """What lies within the first `seconds`."""
        return Sound(self.waveform[:, : round(seconds * self.rate)], self.rate)


@dataclass(frozen=True, slots=True)
class Given:
    """What a clip's files hold, as the codecs take it: cropped and at the clip's rate, as data are prepared."""

    image: Tensor | None = None  # (3, 1, H, W) in [-1, 1]
    video: Tensor | None = None  # (3, F, H, W)
    sound: Sound | None = None  # of the clip's length at least, as far as its file goes


@dataclass(frozen=True, slots=True)
class Readable:
    """A clip whose files are read: ready to be sampled."""

    clip: Clip
    given: Given
    request: Request


@dataclass(frozen=True, slots=True)
class Progress:
    """One clip that is done. `seconds`: its share of what its batch took; the film is `film_seconds` long."""

    outcome: Outcome
    film_seconds: float = 0.0
    seconds: float = 0.0
    step_seconds: float = 0.0
    batch_size: int = 1


def read_given(clip: Clip) -> Given:
    """What the files of a clip hold. Raises `DataError` naming one that cannot be read, or that changed."""
    request, size = clip.request, (clip.request.width, clip.request.height)
    given = Given(
        image=None if request.image is None else _first_frame(request.image, request.image_crf, size),
        video=None if request.video is None else _pictures("video", request.video, clip.frames, clip.fps, size),
        sound=None if request.audio is None else _sound(request.audio, max(clip.seconds, _heard_seconds(clip))),
    )
    check_contents(clip)  # after reading: what changes meanwhile is seen
    return given


def _first_frame(path: str, crf: int | None, size: Any) -> Tensor:
    pixels = _pictures("image", path, 1, None, size)
    if crf is None:
        return pixels
    with TemporaryDirectory() as folder:
        film = Path(folder) / "frame.mp4"
        write_mp4(film, to_frames(pixels), 1, crf=crf)
        return read_video(film)[0]


def _pictures(field: str, path: str, frames: int, fps: float | None, size: Any) -> Tensor:
    with VideoFile(path, name=f"{field}={path}") as file:
        return to_tensor(file.frames(0.0, frames, file.info.fps if fps is None else fps, size))


def _sound(path: str, seconds: float) -> Sound:
    waveform, rate = read_audio(path, duration=seconds, name=f"audio={path}")
    return Sound(to_stereo(waveform), rate)


def _heard_seconds(clip: Clip) -> float:
    """What the latent steps cover: up to half a step more or less than the clip."""
    return clip.bucket.audio_steps * LATENT_STEP


class ClipMaker:
    """Makes clips of batches of requests, one batch at a time, with a model that lies on the device all the while.

    The codecs are on the device only while they encode or decode. What fails is told of its clip, and the rest goes on.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        codecs: Codecs,
        texts: Mapping[str, TextFeatures],
        directory: Path,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        keyframe_marker: bool = True,
        passes_at_once: int | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """`texts`: features of all prompts and negative prompts. `passes_at_once`: see `generate`. `told`: what receipts
        say beside the request.
        """
        self.model, self.codecs, self.texts, self.directory = model, codecs, texts, directory
        self.device, self.dtype, self.keyframe_marker = device, dtype, keyframe_marker
        self.passes_at_once = passes_at_once
        self.told = dict(told or {})

    def make(self, batch: Batch) -> Iterator[Progress]:
        """One batch, from its files to its media; clips that cannot be read or sampled leave the others alone."""
        begin, readable = time.perf_counter(), []
        for clip in batch.clips:
            try:
                given = read_given(clip)
                readable.append(Readable(clip, given, self._request(clip, given)))
            except Exception as error:
                yield Progress(failure(clip, error))
        if readable:
            yield from self._made(readable, begin)

    def _made(self, readable: Sequence[Readable], begin: float) -> Iterator[Progress]:
        """The clips of one call of the sampler, begun at `begin`; of several that fail together, each one alone."""
        latents: Generated | None = None
        try:
            latents, step_seconds = self._sample([one.request for one in readable], readable[0].clip.profile)
        except Exception as error:
            if len(readable) == 1:
                yield Progress(failure(readable[0].clip, error))
                return
            logger.warning("%d clips failed together, so each is sampled alone: %s", len(readable), _reason(error))
        if latents is None:  # behind the handler, where the error no longer holds what had been computed
            for one in readable:
                yield from self._made([one], time.perf_counter())
            return
        shared = (time.perf_counter() - begin) / len(readable)
        for row, one in enumerate(readable):
            begin = time.perf_counter()
            try:
                outcome = self._finish(one.clip, one.given, latents, row, step_seconds)
            except Exception as error:
                yield Progress(failure(one.clip, error))
                continue
            seconds = shared + time.perf_counter() - begin
            yield Progress(outcome, one.clip.seconds, seconds, step_seconds, len(readable))

    def _request(self, clip: Clip, given: Given) -> Request:
        """What is handed to the model: with the latents of what is given."""
        asked = clip.request
        with torch.no_grad(), at_work(self.device, *self._encoders(given)):
            latents: dict[str, Any] = {
                "first_frame": None if given.image is None else self._encoded(given.image),
                "given_video": None if given.video is None else self._encoded(given.video),
                "given_audio": None if given.sound is None else self._heard(given.sound.cut(_heard_seconds(clip))),
            }
        sizes: dict[str, Any] = {
            name: getattr(asked, name) for name in ("frames", "height", "width") if getattr(asked, name)
        }
        return Request(
            text=self.texts[asked.prompt],
            negative=self.texts[asked.negative],
            seed=asked.seed,
            fps=clip.fps,
            has_video=clip.has_video,
            has_audio=clip.has_audio,
            **sizes,
            **latents,
        )

    def _encoders(self, given: Given) -> list[Any]:
        """The codecs that are needed: without given files none has to come to the device."""
        needs_video = given.image is not None or given.video is not None
        return [self.codecs.video] * needs_video + [self.codecs.audio] * (given.sound is not None)

    def _encoded(self, video: Tensor) -> Tensor:
        return self.codecs.video.encode(video[None].to(self.device))[0].cpu()

    def _heard(self, sound: Sound) -> Tensor:
        return self.codecs.audio.encode(sound.waveform[None].to(self.device), sound.rate)[0].cpu()

    def _sample(self, requests: Sequence[Request], profile: SamplerProfile) -> tuple[Generated, float]:
        """The latents, on the CPU, and how long one step of the sampler took.

        The passes of guidance run together as far as the memory goes: of one clip for which it is too little, one by one.
        """
        try:
            return self._generated(requests, profile, self.passes_at_once)
        except torch.OutOfMemoryError:
            if len(requests) > 1 or self.passes_at_once is not None:
                raise
            logger.warning("too little memory for the passes of guidance together, so they run one by one")
        return self._generated(requests, profile, 1)

    def _generated(
        self, requests: Sequence[Request], profile: SamplerProfile, passes_at_once: int | None
    ) -> tuple[Generated, float]:
        begin = time.perf_counter()
        on_device = generate(
            self.model,
            requests,
            profile,
            device=self.device,
            dtype=self.dtype,
            keyframe_marker=self.keyframe_marker,
            passes_at_once=passes_at_once,
        )
        latents = Generated(*(None if x is None else x.cpu() for x in (on_device.video, on_device.audio)))
        return latents, (time.perf_counter() - begin) / profile.steps

    def _finish(self, clip: Clip, given: Given, latents: Generated, row: int, step_seconds: float) -> Outcome:
        """Decode what was generated and write it; only then an earlier clip gives way, and the receipt comes last."""
        if not all(bool(x[row].isfinite().all()) for x in (latents.video, latents.audio) if x is not None):
            raise DataError("the model gave NaN or infinity, so nothing is written. Try other steps or weaker guidance")
        pictures, sound = self._decoded(clip, given, latents, row)
        with staged(self.directory, clip) as folder:
            check_free(self.directory, clip.name, clip.files)
            write_clip(folder, clip, pictures, sound)
            receipt = {
                "digest": clip.digest,
                "files": {name: (folder / name).stat().st_size for name in clip.files},
                "request": {name: getattr(clip.request, name) for name in clip.request.__slots__},
                "profile": clip.profile.to_dict(),
                "step_seconds": step_seconds,
                **self.told,
            }
            settle(self.directory, clip, folder, receipt)
        return Outcome(clip.where, clip.name, State.made, clip.told(self.directory))

    def _decoded(self, clip: Clip, given: Given, latents: Generated, row: int) -> tuple[Frames | None, Sound | None]:
        """Pictures and sound of a clip. What is given is written as it came, not as the codec shows it."""
        video = None if latents.video is None or given.video is not None else latents.video[row]
        audio = None if latents.audio is None or given.sound is not None else latents.audio[row]
        needed = [self.codecs.video] * (video is not None) + [self.codecs.audio] * (audio is not None)
        with at_work(self.device, *needed):
            film = self.codecs.decode(video, audio, clip.fps)
        pictures = film.video if given.video is None else given.video
        sound = given.sound
        if sound is None and film.waveform is not None:
            sound = Sound(film.waveform, film.sample_rate)
        return None if pictures is None else to_frames(pictures), None if sound is None else sound.cut(clip.seconds)


@contextmanager
def staged(directory: Path, clip: Clip) -> Iterator[Path]:
    """An empty folder in `directory` for media that are being written. It vanishes, with what is still in it.

    Raises `ConfigError` while another command writes the clip of that name.
    """
    place = begun_path(directory, clip.name).parent
    taken = "another command writes it ({holder}). Let that end and do this again, or name another --out"
    with lock_alone(place, taken):
        folder = place / "media"
        shutil.rmtree(folder, ignore_errors=True)  # of a killed command
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def settle(directory: Path, clip: Clip, folder: Path, receipt: Mapping[str, Any]) -> None:
    """Puts the media of `folder` in the place of what an earlier clip of that name left. The receipt comes last.

    What lies in the directory is listed all the while, in a receipt or in `begun_path`, so that a command that is killed
    here leaves nothing that the next one does not know.
    """
    former, begun = media_of(directory, clip.name), begun_path(directory, clip.name)
    write_json(begun, {"files": dict.fromkeys([*former, *receipt["files"]])})
    receipt_path(directory, clip.name).unlink(missing_ok=True)
    for name in former:
        (directory / name).unlink(missing_ok=True)
    pictures = directory / clip.name
    if f"{clip.name}/00000.png" in former and pictures.is_dir() and not any(pictures.iterdir()):
        pictures.rmdir()
    for name in receipt["files"]:
        (directory / name).parent.mkdir(exist_ok=True)
        (folder / name).replace(directory / name)
    write_json(receipt_path(directory, clip.name), dict(receipt))
    begun.unlink()


def write_clip(directory: Path, clip: Clip, pictures: Frames | None, sound: Sound | None) -> None:
    """Writes `clip.files`: a clip in the formats that it is asked in."""
    for kind in clip.request.format or ():
        path = directory / f"{clip.name}.{kind}"
        if kind == OutputFormat.wav:
            assert sound is not None
            write_wav(path, sound.waveform, sound.rate)
            continue
        assert pictures is not None
        if kind == OutputFormat.mp4:
            _write_film(path, pictures, clip.fps, sound)
            continue
        for place, picture in enumerate(pictures):
            write_png(directory / clip.name / f"{place:05d}.png", picture)


def _write_film(path: Path, pictures: Frames, fps: float, sound: Sound | None) -> None:
    """Writes an mp4; sound of a rate that its format does not know is brought to one that it does."""
    if sound is not None and sound.rate not in AAC_RATES:
        sound = Sound(resample(sound.waveform, sound.rate, AAC_RATES[0]), AAC_RATES[0])
    heard = (None,) if sound is None else (sound.waveform, sound.rate)
    write_mp4(path, pictures, fps, *heard)


def failure(clip: Clip, error: Exception) -> Outcome:
    """What is told of a clip that could not be made; of what no user can have caused there is a traceback in the log."""
    if not isinstance(error, torch.OutOfMemoryError | Ltx2Error):
        logger.error("%s", clip.where, exc_info=error)
    return Outcome(clip.where, clip.name, State.failed, _reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory. Ask for a smaller clip, or use --passes-at-once or --tile"
    return str(error) if isinstance(error, Ltx2Error) else f"{type(error).__name__}: {error}"
