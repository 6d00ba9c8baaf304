"""The user's cache folder, and JSON files with errors in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import CheckpointError


def cache_folder() -> Path:
    """Where fetched data sets and indexes of shards live: `INTERMODAL_CACHE`, or the user's cache folder."""
    root = os.environ.get("INTERMODAL_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "intermodal")
    return Path(root).expanduser()


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
