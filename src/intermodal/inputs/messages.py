"""What a list of chat messages must look like, checked in one place before anything is rendered; paths in it made absolute; the tools
that a conversation offers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SampleError

THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
MEDIA = ("image", "video", "image_url")
ADDRESS = re.compile(r"data:|file:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
KEYS = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "url", "path")}
"""Under which keys a part has its medium (`media.load_part`)."""
PLACED = (*MEDIA, "url", "path")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Under these names data sets have what the assistant thought before it spoke; templates read one of the first two."""
INSTRUCTING = ("system", "developer")
"""Roles of messages that tell the model how to behave."""
TOOLS = "tools of the conversation"
"""Where each message of a conversation with tools has them: they are then with whatever part of the conversation is read, and a template
does not see this key."""


def check_messages(messages: Any) -> None:
    """Raise when messages are not OpenAI-style ones: a template would render a mistake as something else, silently.

    Raises:
        SampleError: no list, an empty one, a message without a role, or without a content where it calls no tools, a call without a name,
            a thought that is no text, a text with half a character, or a part that is neither text, a box nor a medium.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise SampleError(f'messages must be a list like [{{"role": "user", "content": "..."}}], got {_short(messages)}')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise SampleError(f"a message needs a role and a content, got {_short(message)}")
        for said in message.values():  # templates write roles and names, too
            if isinstance(said, str):
                check_text(said)
        calls, content = _checked_calls(message), message.get("content")
        thoughts_of(message)
        if content is None and calls:
            continue
        if "content" not in message:
            raise SampleError(f"a message needs a role and a content, got {_short(message)}")
        if isinstance(content, str):
            continue
        if not isinstance(content, list | tuple):
            raise SampleError(f"a message's content is a text or a list of parts, got {_short(content)}")
        for part in content:
            _check_part(part)


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of tools in a message, `[{"type": "function", "function": {"name": ..., "arguments": {...}}}]`; none of another role's."""
    return list(message.get("tool_calls") or ()) if message.get("role") == "assistant" else []


def thoughts_of(message: dict[str, Any]) -> list[str]:
    """What the assistant thought before a message. Raises SampleError: it is not text."""
    found = [(name, message[name]) for name in THOUGHTS if message.get("role") == "assistant" and message.get(name) is not None]
    for name, thought in found:
        if not isinstance(thought, str):
            raise SampleError(f"a message's {name} is a text, got {_short(thought)}")
    return [thought.strip() for _, thought in found if thought.strip()]


def thoughts_apart(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content, or its first part, begins with `<think>...</think>` with that in `reasoning_content`, where templates for
    thinking put it."""
    out = []
    for message in messages:
        content, apart = message.get("content"), {}
        parts = content if isinstance(content, list) else as_parts(content) or []
        text = parts[0].get("text") if parts else None
        found = THOUGHT.match(text) if isinstance(text, str) and message.get("role") == "assistant" else None
        if found:
            words: Any = found[2].lstrip("\n")
            if isinstance(content, list):
                words = [*([{**parts[0], "text": words}] if words else []), *parts[1:]]
            apart = {"reasoning_content": found[1].strip("\n"), "content": words}
        out.append({**message, **apart})
    return out


def _checked_calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if message["role"] != "assistant" or not isinstance(calls, list | tuple):
        raise SampleError(f"tool_calls are a list, in a message of the assistant, got {_short(message)}")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise SampleError(f'a call of a tool is {{"function": {{"name": ..., "arguments": {{...}}}}}}, got {_short(call)}')
    check_text(json.dumps(calls, ensure_ascii=False, default=str))
    return list(calls)


def with_tools(messages: Any, tools: Sequence[dict[str, Any]] | str | None) -> Any:
    """Messages that carry the tools they may call, JSON schemas as transformers' `apply_chat_template(messages, tools=...)` takes them; the
    messages themselves where there are none. Data sets of columns keep the list as a text of JSON, which is read.

    Raises:
        SampleError: these are no schemas.
    """
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise SampleError(f"tools are a list of JSON schemas, got a text that is no JSON ({error}): {_short(tools)}") from None
    if not tools:
        return messages
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise SampleError(f"tools are a list of JSON schemas, got {_short(tools)}")
    check_text(json.dumps(tools, ensure_ascii=False, default=str))
    if not isinstance(messages, list | tuple):
        return messages  # `check_messages` says what is wrong with them
    return [{**message, TOOLS: tools} if isinstance(message, dict) else message for message in messages]


def tools_of(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]] | None:
    """The tools that messages carry."""
    return next((message[TOOLS] for message in messages if TOOLS in message), None)


def _check_part(part: Any) -> None:
    if not isinstance(part, dict):
        raise SampleError(f"a part of a message must be an object with a type, got {_short(part)}")
    kind = part.get("type", next((name for name in ("text", *MEDIA) if name in part), None))
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise SampleError(f"a text part needs a text, got {_short(part)}")
        check_text(part["text"])
    elif kind in MEDIA:
        keys = KEYS["video" if kind == "video" else "image"]
        if all(part.get(name) is None for name in keys):
            raise SampleError(f"a part of type {kind} needs {kind!r} (or {', '.join(keys[1:])}), got {_short(part)}")
    elif kind != "box":
        raise SampleError(f"a part is text, image, image_url, video or box, got {_short(part)}")


def check_text(text: str) -> None:
    """Raises SampleError: a half of a surrogate pair, which has no UTF-8."""
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
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [{key: _placed(value, folder) if key in PLACED else value for key, value in part.items()} for part in content]
        out.append({**message, "content": content} if "content" in message else message)
    return out


def in_lists(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages with their parts in lists, where someone gave a tuple."""
    return [
        message | {"content": list(parts)} if isinstance(parts := message.get("content"), tuple) else message
        for message in messages
    ]


def parts_of(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of all messages that have parts."""
    return [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]


def without_media(messages: Sequence[dict[str, Any]], as_text: bool) -> list[dict[str, Any]]:
    """Messages as templates want them: media without their payload, tools and what is None left out (as transformers leaves it out, for
    some templates loop over a content that is there), thoughts under the names that templates read; for text-only templates the text
    alone."""
    out = []
    for message in messages:
        bare = {name: said for name, said in message.items() if name != TOOLS and said is not None}
        value = message.get("content")
        if isinstance(value, list):
            value = [_bare(part) for part in value]
            if as_text and all(part["type"] == "text" for part in value):
                value = "".join(part["text"] for part in value)
            bare["content"] = value
        out.append(_with_thought(bare))
    return out


def _with_thought(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thought under each name that templates read, as transformers has it."""
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def with_null_content(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is there and None where they only call tools: DeepSeek-R1's template writes no other calls."""
    return [{**message, "content": None} if calls_of(message) and not message.get("content") else message for message in messages]


def as_parts(value: Any) -> Any:
    """A text as a list of one part; anything else as it is."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type", "text") == "text" and "text" in part:
        return {"type": "text", "text": part["text"]}
    return {"type": "video" if part.get("type", "video" if "video" in part else "") == "video" else "image"}


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, list | tuple):
        return [_placed(one, folder) for one in value]
    if isinstance(value, dict):
        return {key: _placed(one, folder) if key == "url" else one for key, one in value.items()}
    if not isinstance(value, str) or ADDRESS.match(value):
        return value
    return str(folder / os.path.expanduser(value))  # Path.expanduser raises at a `~` of no known user


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + " ..."
