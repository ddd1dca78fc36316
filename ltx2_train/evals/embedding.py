"""Media inside a page, as many as its size allows. What does not fit is named by its path."""

import base64
from dataclasses import dataclass, field
from pathlib import Path

from ltx2_train.errors import DataError

MIME_TYPES = {".mp4": "video/mp4", ".png": "image/png", ".wav": "audio/wav"}


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

    def embed(self, path: Path, *, needed: bool = False) -> Embedded:
        """The file for this place of the page. Raises `DataError` when a `needed` file is gone."""
        if path in self._known:
            return Embedded(path, self._known[path])
        if not path.exists():
            self._note_missing(path, needed)
            return Embedded(path, missing=True)
        is_film = path.suffix == ".mp4"
        if self.used + path.stat().st_size * 4 / 3 > self.budget * (FILM_SHARE if is_film else 1):
            self.left.append(path)
            return Embedded(path)
        uri = data_uri(path)
        self.used += len(uri)
        self.films += is_film
        self._known[path] = f"m{len(self._known)}"
        return Embedded(path, self._known[path], uri)

    def picture(self, path: Path, *, needed: bool = False) -> str | None:
        """The address of a picture that stands in one place of the page, or None."""
        return self.embed(path, needed=needed).uri

    def _note_missing(self, path: Path, needed: bool) -> None:
        if needed:
            raise DataError(f"{path} is named by samples.json but missing. Run ltx2-evaluate for this run again")
        self.missing.append(path)

    @property
    def told(self) -> str:
        """What of the media is in the page."""
        text = f"{self.films} films are in this page ({self.used / 1e6:.2g} of at most {self.budget / 1e6:.3g} MB)."
        if self.left:
            text += (
                f" {len(self.left)} further files would not fit (--media-mb); frames or the path stand in their place."
            )
        if self.missing:
            text += f" {len(self.missing)} files are named by samples.json and gone."
        return text


def data_uri(path: Path) -> str:
    """The file as text that a page can hold."""
    return f"data:{MIME_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
