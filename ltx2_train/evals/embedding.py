"""Media inside a page, as many as its size allows. What does not fit is named by its path."""

import base64
import logging
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

MIME_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".wav": "audio/wav"}
NAMED = 4  # files that are gone, by their names; of the others the number
FILM_SHARE = 0.75  # of the room is for films at most, so that strips of frames can stand for those that do not fit


@dataclass(frozen=True, slots=True)
class Embedded:
    """A file as one place of a page has it: here (`uri`), elsewhere in the page (`id` alone), or at its path only."""

    path: Path
    id: str | None = None
    uri: str | None = None
    missing: bool = False


@dataclass(slots=True)
class Media:
    """Gives each file once; a second use refers to the first. Files beyond `budget` bytes of page are left out."""

    budget: int
    used: int = 0
    films: int = 0
    left: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    _known: dict[Path, str] = field(default_factory=dict)

    def embed(self, path: Path) -> Embedded:
        """The file for this place of the page. One that is gone is told of: an evaluation replaces them meanwhile."""
        if path in self._known:
            return Embedded(path, self._known[path])
        try:
            return self._embed(path)
        except FileNotFoundError:
            log.warning("%s is named by samples.json and gone; the page stands without it", path)
            self.missing.append(path)
            return Embedded(path, missing=True)

    def _embed(self, path: Path) -> Embedded:
        is_film = path.suffix == ".mp4"
        if self.used + path.stat().st_size * 4 / 3 > self.budget * (FILM_SHARE if is_film else 1):
            self.left.append(path)
            return Embedded(path)
        uri = data_uri(path)
        self.used += len(uri)
        self.films += is_film
        self._known[path] = f"m{len(self._known)}"
        return Embedded(path, self._known[path], uri)

    def picture(self, path: Path) -> str | None:
        """The address of a picture that stands in one place of the page, or None."""
        return self.embed(path).uri

    @property
    def told(self) -> str:
        """What of the media is in the page."""
        text = f"{self.films} films are in this page ({self.used / 1e6:.2g} of at most {self.budget / 1e6:.3g} MB)."
        if self.left:
            text += (
                f" {len(self.left)} further files would not fit (--media-mb); frames or the path stand in their place."
            )
        if self.missing:
            names = ", ".join(f"{path.parent.name}/{path.name}" for path in self.missing[:NAMED])
            more = ", ..." if len(self.missing) > NAMED else ""
            text += f" {len(self.missing)} files are named by samples.json and gone: {names}{more}."
        return text


def data_uri(path: Path) -> str:
    """The file as text that a page can hold."""
    return f"data:{MIME_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
