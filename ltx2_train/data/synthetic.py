"""A small world of bouncing balls with sound: picture and sound share what no caption says, the impact times.

A coloured ball is held, released and bounces on the ground; every impact makes a click whose pitch follows the colour
and whose place in the stereo field follows the ball. When the ball is released, and from how high, varies freely, so
only the exchange between the streams can bring sound and picture into step. A clip is a pure function of its seed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ltx2_train.errors import ConfigError
from ltx2_train.rng import derive_seed

SAMPLE_RATE = 16000
REFERENCE_SIZE = 64  # px; all lengths below are for a frame whose shorter side is this long
BALL_RADIUS = 7.0
FLOOR_HEIGHT = 8.0  # the ground line lies this far above the lower edge
DROP_HEIGHTS = (24.0, 42.0)  # how far the ball falls
GRAVITY = 350.0  # px/s2
RESTITUTION = (0.72, 0.84)
EARLIEST_RELEASE = 0.03  # s
LATEST_RELEASE_BEFORE_END = 0.758  # s; leaves room for a fall in a clip of ordinary length
QUIET_END = 0.13  # s without an impact at the end: a click that the clip cuts off teaches nothing
REST_SPEED = 30.0  # px/s; slower impacts end the bouncing
CLICK_DECAY = 0.03  # s
CLICK_LEVEL = 0.5
SHORTEST_CLIP = 0.6  # s
MAX_ATTEMPTS = 1000

BALLS: dict[str, tuple[tuple[int, int, int], float, str]] = {  # name -> RGB, pitch in Hz, how a caption calls the pitch
    "red": ((232, 44, 40), 420.0, "very low"),
    "orange": ((250, 150, 24), 680.0, "low"),
    "yellow": ((242, 232, 56), 1050.0, "medium"),
    "green": ((48, 214, 72), 1600.0, "bright"),
    "blue": ((64, 128, 255), 2400.0, "high"),
    "pink": ((244, 84, 220), 3500.0, "very high"),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 16),
    "navy": (16, 22, 62),
    "brown": (58, 34, 18),
    "grey": (60, 62, 66),
}
FLOOR_SHADE = 34  # the floor strip is lighter than the background by this much


@dataclass(kw_only=True, slots=True)
class WorldConfig:
    """What clips of the world look like, and how often something is missing from them."""

    width: int = 64
    """Frame width in pixels."""
    height: int = 64
    """Frame height in pixels."""
    frames: int = 41
    """Pixel frames of a clip; 1 makes every clip a single image."""
    fps: float = 24.0
    """Frames per second."""
    silent_fraction: float = 0.0
    """Share of clips without an audio track, in [0, 1]."""
    image_fraction: float = 0.0
    """Share of single images, in [0, 1]."""

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 32:
            raise ConfigError(f"width, height: {self.width} x {self.height} px; the world needs at least 32 x 32")
        if self.frames < 1 or not self.fps > 0:
            raise ConfigError(f"frames, fps: {self.frames} at {self.fps}; need frames >= 1 and fps > 0")
        if self.frames > 1 and self.frames / self.fps < SHORTEST_CLIP:
            raise ConfigError(f"frames: {self.frames} at {self.fps} fps last {self.frames / self.fps:.2f} s; "
                              f"a fall needs {SHORTEST_CLIP} s (or 1 frame for a single image)")  # fmt: skip
        for name in ("silent_fraction", "image_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: {getattr(self, name)}; need a share in [0, 1]")
        if self.silent_fraction + self.image_fraction > 1:
            raise ConfigError("silent_fraction + image_fraction: their sum must not exceed 1")


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip of the world and its ground truth."""

    video: NDArray[np.uint8]  # (F, H, W, 3) RGB
    waveform: NDArray[np.float32] | None  # (2, round(16000 F / fps)); None: no audio track, which is not silence
    fps: float
    caption: str  # what is seen and heard, never when
    impact_times: tuple[float, ...]  # s from the start of the clip
    color: str
    background: str

    @property
    def has_audio(self) -> bool:
        return self.waveform is not None


@dataclass(frozen=True, slots=True)
class _Fall:
    """Motion of one ball: `impacts` are (time in s, speed in px/s); the ball rests after the last one."""

    release: float
    height: float
    gravity: float
    restitution: float
    impacts: tuple[tuple[float, float], ...]

    def heights(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Height above the resting place in px at `times`."""
        fallen = np.maximum(times - self.release, 0.0)
        height = np.where(times < self.impacts[0][0], self.height - 0.5 * self.gravity * fallen**2, 0.0)
        for start, speed in self.impacts:
            up = speed * self.restitution
            since = times - start
            flying = (since >= 0) & (since < 2 * up / self.gravity)
            height = np.where(flying, up * since - 0.5 * self.gravity * since**2, height)
        return np.maximum(height, 0.0)


def bounce_clip(seed: int, config: WorldConfig | None = None) -> Clip:
    """The clip of `seed`: a pure function of its arguments."""
    config = config or WorldConfig()
    rng = np.random.Generator(np.random.PCG64(derive_seed("bounce", seed)))
    kind, scale = rng.random(), min(config.width, config.height) / REFERENCE_SIZE
    color, background = str(rng.choice(list(BALLS))), str(rng.choice(list(BACKGROUNDS)))
    radius = BALL_RADIUS * scale
    x = rng.uniform(radius + 1, config.width - radius - 1)
    is_image = config.frames == 1 or kind < config.image_fraction
    has_audio = not is_image and kind >= config.image_fraction + config.silent_fraction
    duration = config.frames / config.fps
    impacts: tuple[tuple[float, float], ...] = ()
    if is_image:
        heights = rng.uniform(0, DROP_HEIGHTS[1], 1) * scale
    else:
        fall = _draw_fall(rng, duration, scale)
        heights, impacts = fall.heights(np.arange(config.frames) / config.fps), fall.impacts
    centres = config.height - FLOOR_HEIGHT * scale - radius - heights
    samples = round(SAMPLE_RATE * duration)
    top_speed = (2 * GRAVITY * DROP_HEIGHTS[1]) ** 0.5 * scale
    clicks = [(time, speed / top_speed) for time, speed in impacts]
    return Clip(
        video=_draw(centres, x, radius, color, background, config, scale),
        waveform=_sound(clicks, BALLS[color][1], x / config.width, samples) if has_audio else None,
        fps=config.fps,
        caption=_caption(color, background, has_audio, is_image),
        impact_times=tuple(time for time, _ in impacts),
        color=color,
        background=background,
    )


def _draw_fall(rng: np.random.Generator, duration: float, scale: float) -> _Fall:
    """A fall with at least one impact and none in the quiet end, by rejection."""
    for _ in range(MAX_ATTEMPTS):
        latest = max(EARLIEST_RELEASE, duration - LATEST_RELEASE_BEFORE_END)
        release, height = rng.uniform(EARLIEST_RELEASE, latest), rng.uniform(*DROP_HEIGHTS) * scale
        gravity, restitution = GRAVITY * scale, rng.uniform(*RESTITUTION)
        impacts = _impacts(release, height, gravity, restitution, duration, REST_SPEED * scale)
        if impacts and impacts[-1][0] <= duration - QUIET_END:
            return _Fall(release, height, gravity, restitution, impacts)
    raise AssertionError(f"no fall fits into {duration} s: SHORTEST_CLIP is too small")


def _impacts(
    release: float, height: float, gravity: float, restitution: float, duration: float, rest_speed: float
) -> tuple[tuple[float, float], ...]:
    """(time, speed) of the impacts within `duration`, until the ball comes to rest."""
    time, speed = release + (2 * height / gravity) ** 0.5, (2 * gravity * height) ** 0.5
    impacts = []
    while time < duration and speed > rest_speed:
        impacts.append((time, speed))
        speed *= restitution
        time += 2 * speed / gravity
    return tuple(impacts)


def _draw(
    centres: NDArray[np.float64],
    x: float,
    radius: float,
    color: str,
    background: str,
    config: WorldConfig,
    scale: float,
) -> NDArray[np.uint8]:
    """Frames (F, H, W, 3): an antialiased disc; only the columns that it touches are computed."""
    height, width = config.height, config.width
    scene = np.full((height, width, 3), BACKGROUNDS[background], dtype=np.uint8)
    scene[round(height - FLOOR_HEIGHT * scale) :] += np.uint8(FLOOR_SHADE)
    video = np.repeat(scene[None], len(centres), axis=0)
    left, right = max(0, int(x - radius - 1)), min(width, int(x + radius + 2))
    rows, columns = np.arange(height, dtype=np.float32) + 0.5, np.arange(left, right, dtype=np.float32) + 0.5
    squared = (rows - centres[:, None].astype(np.float32))[:, :, None] ** 2 + (columns - np.float32(x)) ** 2
    cover = np.clip(np.float32(radius + 0.5) - np.sqrt(squared), 0, 1)[..., None]
    strip = scene[:, left:right].astype(np.float32)
    video[:, :, left:right] = strip + cover * (np.array(BALLS[color][0], dtype=np.float32) - strip) + np.float32(0.5)
    return video


def _sound(clicks: list[tuple[float, float]], pitch: float, place: float, samples: int) -> NDArray[np.float32]:
    """Waveform (2, samples): a decaying tone for each (time, level), panned at constant power to `place` in [0, 1]."""
    mono = np.zeros(samples)
    time = np.arange(samples) / SAMPLE_RATE
    for start, level in clicks:
        first = int(np.ceil(start * SAMPLE_RATE))
        since = time[first:] - start
        tone = np.sin(2 * np.pi * pitch * since) + 0.3 * np.sin(4 * np.pi * pitch * since)
        mono[first:] += CLICK_LEVEL * level * np.exp(-since / CLICK_DECAY) * tone
    angle = place * np.pi / 2
    return (np.array([[np.cos(angle)], [np.sin(angle)]]) * mono).astype(np.float32)


def _caption(color: str, background: str, has_audio: bool, is_image: bool) -> str:
    article = "An" if color[0] in "aeiou" else "A"
    if is_image:
        return f"{article} {color} ball on a {background} background, a single image without sound."
    heard = f"each impact makes a {BALLS[color][2]} click" if has_audio else "without sound"
    return f"{article} {color} ball falls and bounces on a {background} background, {heard}."
