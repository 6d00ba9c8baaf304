"""What is typed at a terminal: the commands of `chat`, the paths behind them, and what its user is told about the context."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

COMMANDS = {"/image": "/image PATH", "/video": "/video PATH", "/new": "/new"}
"""The commands, and how each is written."""
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv", ".gif",
)  # fmt: skip
_ADVICE = re.compile(r",? or set too_long=\S*drop_oldest\S* to leave out the oldest turns")


def command_of(said: str) -> tuple[str, str] | None:
    """The command of a line and what stands behind it, without the spaces around it; None for a question.

    A line of one word like `/bogus` is taken for a command that does not exist. A path, or several words, may be a question.
    """
    word, *rest = said.split(maxsplit=1)
    if word in COMMANDS or re.fullmatch(r"/[a-z]+", said.strip()):
        return word, "".join(rest).strip()
    return None


def path_of(typed: str) -> str:
    """A path as it was typed or pasted: terminals put quotes around the name of a file that is dropped on them, or backslashes before
    its spaces. A name that is there as it stands is left alone, since it may hold quotes itself."""
    if _exists(typed):
        return typed
    try:
        words = shlex.split(typed)
    except ValueError:  # an apostrophe in a name
        return typed
    return words[0] if len(words) == 1 else typed


def is_missing(path: str) -> bool:
    """Whether a name can only be a path, and nothing is there."""
    return not path.startswith("data:") and "://" not in path and not _exists(path)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # no name that a file can have; a home that nobody has
        return False


def by_kind(media: list[str]) -> tuple[list[str], list[str]]:
    """Pictures and videos, told apart by their suffixes."""
    videos = [path for path in media if path.lower().endswith(VIDEO_SUFFIXES)]
    return [path for path in media if path not in videos], videos


def content(text: str, images: list[str], videos: list[str]) -> Any:
    """Plain text, or parts with what is shown first (the order the models were trained in)."""
    shown = [{"type": "image", "image": path} for path in images] + [{"type": "video", "video": path} for path in videos]
    return [*shown, {"type": "text", "text": text}] if shown else text


def left_out(dropped: int) -> str:
    """What is said of `dropped` messages that a question went to the model without."""
    messages = "oldest message was" if dropped == 1 else f"{dropped} oldest messages were"
    return f"(the {messages} left out of this question: the model's context has no room for the whole conversation and a reply)"


def with_option(error: Exception, messages: list[dict[str, Any]]) -> str:
    """An error's text for the command line: a conversation that is too long is mended by an option there, not by a setting. Of a
    single question nothing can be dropped, so that is not advised."""
    several = sum(message["role"] == "user" for message in messages) > 1
    return _ADVICE.sub(", or give --too-long drop_oldest to leave out the oldest turns" if several else "", str(error))
