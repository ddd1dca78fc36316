"""Decode one record for eye and ear: writes what it holds as mp4, png or wav, and prints its json.

Takes a raw shard, a latent shard or a directory of latent shards, and a key or a number. Latents go through the codecs
that their manifest names, so this is what training sees.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep import console
from data_prep.raw import KEY_MAP
from data_prep.tars import Members, list_shards, read_tar
from ltx2_train.cli.components import Components, ComponentsConfig
from ltx2_train.errors import DataError
from ltx2_train.media.probe import probe
from ltx2_train.media.video import read_video
from ltx2_train.media.write import atomic, write_mp4, write_png, write_wav
from ltx2_train.record import MANIFEST_NAME, Manifest, Sample, decode_record


@dataclass(frozen=True, slots=True)
class Shown:
    """What was written, and what the record says of itself."""

    key: str
    files: list[Path]
    meta: dict[str, Any]


def show(shards: str, out: Path, record: str = "0") -> Shown:
    """Decode the record of a key, or of a number in the order of the shards, into files under `out`."""
    url, key, members = find_record(shards, record)
    if "safetensors" in members:
        return show_latents(key, members, Manifest.load(Path(url).parent), out)
    return show_raw(key, members, out)


def find_record(shards: str, record: str) -> tuple[str, str, Members]:
    """(shard, key, members) of a record. Raises `DataError` when there is none of that key or number."""
    place = 0
    for url in list_shards([shards]):
        for key, members in read_tar(url):
            if key == record or str(place) == record:
                return url, key, members
            place += 1
    raise DataError(f"{shards}: no record {record!r}; it has {place}. Give a key, or a number below that")


def show_raw(key: str, members: Members, out: Path) -> Shown:
    """Write the media of a raw record as they are stored; a video's facts are added to its json."""
    meta = json.loads(members.get("json", b"{}"))
    files = []
    for extension, content in members.items():
        if extension in KEY_MAP["video"] + KEY_MAP["audio"]:
            files.append(out / f"{key}.{extension}")
            with atomic(files[-1]) as partial:
                partial.write_bytes(content)
            meta[f"probe of .{extension}"] = str(probe(content, name=f"{key}.{extension}"))
            if extension in KEY_MAP["video"]:
                files.append(write_contact_sheet(out / f"{key}.frames.png", read_video(content, name=key)[0]))
    return Shown(key, files, meta)


def show_latents(key: str, members: Members, manifest: Manifest, out: Path) -> Shown:
    """Write what the latents of a record decode to."""
    sample = decode_record(key, members["safetensors"], members["json"])
    video, waveform, rate = _decoded(sample, manifest)
    files = []
    if video is not None and video.shape[1] > 1:
        files.append(out / f"{key}.mp4")
        write_mp4(files[-1], video, sample.fps, waveform, rate)
    if video is not None:
        files.append(write_contact_sheet(out / f"{key}.frames.png", video))
    if waveform is not None:
        files.append(out / f"{key}.wav")
        write_wav(files[-1], waveform, rate)
    sizes = {"bucket": str(sample.bucket), "text_tokens": len(sample.text.video)}
    return Shown(key, files, {"caption": sample.caption, "fps": sample.fps, **sizes, **sample.meta})


def _decoded(sample: Sample, manifest: Manifest) -> tuple[Tensor | None, Tensor | None, int]:
    """Video (3, F, H, W), waveform (2, N) and its rate."""
    video, audio = (None if latent is None else latent.float() for latent in (sample.video, sample.audio))
    film = Components.of(ComponentsConfig(), manifest).codecs().decode(video, audio, sample.fps)
    return film.video, film.waveform, film.sample_rate


def write_contact_sheet(path: Path, video: Tensor, columns: int = 8) -> Path:
    """Write up to `columns` frames of a clip (3, F, H, W), evenly spaced in time, beside each other; returns the path."""
    count = min(columns, video.shape[1])
    places = [round(i * (video.shape[1] - 1) / max(1, count - 1)) for i in range(count)]
    write_png(path, video[:, places].permute(0, 2, 1, 3).flatten(2))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    example = "python -m data_prep.show latents/train --record clip-000012 --out shown"
    parser = console.parser("show", __doc__ or "", example)
    parser.add_argument(
        "shards", help=f"a shard or a directory of shards; latent ones lie beside their {MANIFEST_NAME}"
    )
    parser.add_argument("--record", default="0", help="key, or number in the order of the shards")
    parser.add_argument("--out", type=Path, default=Path("shown"), help="directory for the files")
    options = parser.parse_args(argv)
    shown = show(options.shards, options.out, options.record)
    print(json.dumps({"key": shown.key, **shown.meta}, indent=1, ensure_ascii=False))
    print("\n".join(map(str, shown.files)))


if __name__ == "__main__":
    console.run(main)
