"""What a list of chat messages must look like, checked in one place before anything is rendered, and paths in it made absolute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SampleError

MEDIA = ("image", "video", "image_url")
ADDRESSES = ("data:", "http:", "https:", "file:")


def check_messages(messages: Any) -> None:
    """Raise when messages are not OpenAI-style ones: a template would render a mistake as something else, silently.

    Raises:
        SampleError: no list, an empty one, a message without a role or content, or a part that is neither text, a box nor a medium.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise SampleError(f'messages must be a list like [{{"role": "user", "content": "..."}}], got {_short(messages)}')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise SampleError(f"a message needs a role and a content, got {_short(message)}")
        content = message["content"]
        if isinstance(content, str):
            _check_text(content)
            continue
        if not isinstance(content, list | tuple):
            raise SampleError(f"a message's content is a text or a list of parts, got {_short(content)}")
        for part in content:
            _check_part(part)


def _check_part(part: Any) -> None:
    if not isinstance(part, dict):
        raise SampleError(f"a part of a message must be an object with a type, got {_short(part)}")
    kind = part.get("type", next((name for name in ("text", *MEDIA) if name in part), None))
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise SampleError(f"a text part needs a text, got {_short(part)}")
        _check_text(part["text"])
    elif kind in MEDIA:
        if all(part.get(name) is None for name in (("video",) if kind == "video" else ("image", "image_url"))):
            raise SampleError(f"a part of type {kind} needs {kind!r}, got {_short(part)}")
    elif kind != "box":
        raise SampleError(f"a part is text, image, image_url, video or box, got {_short(part)}")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"a text holds half a character at {error.start} ({text[error.start]!a}, from a cut \\ud83d\\ude00 pair): no tokenizer takes it"
        ) from None


def placed(messages: Any, folder: Path) -> list[dict[str, Any]]:
    """Checked messages with the paths of pictures, clips and frames taken from `folder` where they are relative.

    Raises:
        SampleError: as `check_messages`.
    """
    check_messages(messages)
    out = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [{key: _placed(value, folder) if key in MEDIA else value for key, value in part.items()} for part in content]
        out.append({**message, "content": content})
    return out


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_placed(one, folder) for one in value]
    if isinstance(value, dict):
        return {key: _placed(one, folder) if key == "url" else one for key, one in value.items()}
    if not isinstance(value, str) or value.startswith(ADDRESSES):
        return value
    return str(folder / Path(value).expanduser())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + " ..."
