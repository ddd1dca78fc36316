"""Pixel sizes that clips are brought to before they are encoded, and which one a clip takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ltx2_train.errors import ConfigError, DataError
from ltx2_train.geometry import latent_frames, latent_size


@dataclass(frozen=True, slots=True)
class PixelBucket:
    """Width and height in pixels (multiples of 32) and frames (8k + 1; 1 is for still images)."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def parse_buckets(text: str) -> list[PixelBucket]:
    """The buckets of "WxHxF;WxHxF". Raises `ConfigError` naming the one that is wrong."""
    buckets = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            width, height, frames = (int(number) for number in part.lower().split("x"))
            latent_size(width, "width"), latent_size(height, "height"), latent_frames(frames)
        except DataError as error:
            raise ConfigError(f"buckets: {part!r}: {error}") from error
        except ValueError as error:
            raise ConfigError(f'buckets: {part!r} is not WIDTHxHEIGHTxFRAMES, such as "768x512x121"') from error
        buckets.append(PixelBucket(width, height, frames))
    if not buckets:
        raise ConfigError('buckets: none given; name at least one, such as "768x512x121"')
    return buckets


def choose(buckets: Sequence[PixelBucket], width: int, height: int, frames: int) -> PixelBucket | None:
    """The bucket of a clip, or None where it is too short for all.

    Closest aspect ratio, then most frames, then largest area. A still image takes buckets of one frame and
    a clip takes the others: a clip is never cut into single frames.
    """
    fitting = [b for b in buckets if (b.frames == 1 if frames == 1 else 1 < b.frames <= frames)]

    def order(bucket: PixelBucket) -> tuple[float, int, int]:
        aspect = abs(math.log(width / height) - math.log(bucket.width / bucket.height))
        return (round(aspect, 9), -bucket.frames, -bucket.height * bucket.width)

    return min(fitting, key=order, default=None)
