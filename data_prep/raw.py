"""What a raw record holds: picture, sound, caption and json, each a member that goes by its extension."""

import json
from collections.abc import Mapping
from typing import Any

from data_prep.dropped import Dropped
from data_prep.tars import Members
from ltx2_train.errors import ConfigError, DataError
from ltx2_train.media.probe import IMAGE_SUFFIXES

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg", ".mpeg", *IMAGE_SUFFIXES)
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".m4a", ".aac", ".ogg", ".opus")
PACK_NAME = "pack.json"  # beside packed shards: the SHA-256 of each, and how they were packed
KeyMap = Mapping[str, list[str]]  # extensions by role; a role that is not given has those of `KEY_MAP`
KEY_MAP = {
    "video": [suffix[1:] for suffix in VIDEO_SUFFIXES],
    "audio": [suffix[1:] for suffix in AUDIO_SUFFIXES],
    "caption": ["txt", "caption"],
    "json": ["json"],
}


def parse_key_map(text: str) -> dict[str, list[str]]:
    """Extensions by role from "video=mp4;webm,caption=txt"."""
    roles = {}
    for part in filter(None, text.split(",")):
        role, separator, names = part.partition("=")
        if not separator or not names:
            raise ConfigError(f'key_map: {part!r}; write "video=mp4,caption=txt"; alternatives: "video=mp4;webm"')
        roles[role.strip()] = [name.strip().lstrip(".").lower() for name in names.split(";")]
    return roles


def member(members: Members, role: str, key_map: KeyMap) -> bytes | None:
    """What a record has for a role of `KEY_MAP`, by the first extension that is there; None for nothing."""
    return members[name] if (name := _member_name(members, role, key_map)) else None


def _member_name(members: Members, role: str, key_map: KeyMap) -> str | None:
    return next((name for name in key_map.get(role, KEY_MAP[role]) if name in members), None)


def unread(members: Members, key_map: KeyMap) -> list[str]:
    """Extensions of the members that no role takes."""
    return sorted(set(members) - {_member_name(members, role, key_map) for role in KEY_MAP})


def raw_json(key: str, members: Members, key_map: KeyMap) -> dict[str, Any]:
    """The fields of a record's json; none where it has no json. Raises `DataError` for one that is corrupt."""
    text = member(members, "json", key_map)
    try:
        fields = parse_json(text) if text is not None else {}
    except ValueError as error:
        raise DataError(f"{key}: corrupt json ({error}). Re-run data_prep.pack for its shard") from error
    return fields if isinstance(fields, dict) else {"value": fields}


def caption_of(key: str, members: Members, fields: Mapping[str, Any], key_map: KeyMap) -> str:
    """The caption of a record: its own member, else that of its json, else "". Raises `Dropped` for an unreadable one."""
    text = member(members, "caption", key_map)
    return read_caption(text, key) if text is not None else str(fields.get("caption", "")).strip()


def source_of(key: str, fields: Mapping[str, Any]) -> str:
    """The file that a record was cut from; of a foreign record its key."""
    return str(fields.get("source", key))


def truth_of(fields: Mapping[str, Any]) -> Any:
    """What the metadata said beside the caption; of a foreign record all of its json."""
    return fields.get("truth", {k: v for k, v in fields.items() if k != "caption"})


def read_caption(text: bytes, name: str) -> str:
    """A caption from its bytes in UTF-8. Raises `Dropped` naming it for others."""
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Dropped("caption_unreadable", f"{name}: {error}. Save it as UTF-8") from error


def parse_json(text: str | bytes) -> Any:
    """A JSON value; NaN and infinities, which JSON does not know, become null."""
    return json.loads(text, parse_constant=lambda _: None)
