"""The user's cache folder; text and JSON files read with errors in words, and written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import CheckpointError, IntermodalError


def cache_folder() -> Path:
    """Where fetched data sets, indexes of shards and compiled kernels live: `INTERMODAL_CACHE`, or the user's cache folder."""
    root = os.environ.get("INTERMODAL_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "intermodal")
    return Path(root).expanduser()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark. Raises IntermodalError: it is in another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise IntermodalError(
            f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8, of Latin-1 for example by "
            f"iconv -f latin1 -t utf-8"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when the file is missing or is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all: the process may be killed meanwhile, and others may be reading."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)
