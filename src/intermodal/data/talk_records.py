"""Records of conversations, in the forms in which data sets come, as messages: the same from a file and from a stream."""

from __future__ import annotations

from typing import Any

from ..errors import SampleError
from ..inputs.messages import with_tools

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KINDS = ("image", "video")
UNHEARD = ("audio", "audios")
PAYLOADS = (*KINDS, "image_url", "url", "path", "base64")
"""Under one of these names a part brings its own picture or clip."""


def messages_of(record: Any) -> list[dict[str, Any]]:
    """A record's messages, with everything that it says of them.

    It is a list of messages; or `{"messages": [...]}`, as TRL, ms-swift and LLaMA-Factory have it, its pictures in the messages or in
    `images` (`image`, `videos`, `video`) and shown by parts without a payload or by `<image>` in the texts; or LLaVA's and ShareGPT's
    `{"conversations": [{"from", "value"}]}`, each `<image>` and `<video>` a part; with a `system` prompt and `tools` beside either. Or it
    is a document of texts and pictures in turn, as OBELICS has them (`images` and `texts`) or MMC4 (`text_list` and `image_info`), which
    becomes what the assistant says, all of it learned.

    Raises:
        SampleError: none of the forms, an unknown speaker, a turn without a text, or other counts of pictures than the messages show.
    """
    if isinstance(record, list):
        return record
    record = record if isinstance(record, dict) else {}
    if isinstance(record.get("messages"), list):
        left = _media(record)
        named = any(name in record for kind in KINDS for name in (kind, f"{kind}s"))
        messages = [_shown(message, left, named) for message in record["messages"]]
        unused = next(((kind, len(values)) for kind, values in left.items() if values), None)
        if unused is not None:
            what = {"image": "pictures", "video": "videos"}[unused[0]]
            raise SampleError(f"the record has {unused[1]} {what} more than its messages show")
    elif "texts" in record or "text_list" in record:
        return [{"role": "assistant", "content": _document(record)}]
    elif isinstance(record.get("conversations"), list):
        messages = _turns(record)
    else:
        raise SampleError("a record needs `messages`, LLaVA's `conversations`, or a document's `images` and `texts`")
    return with_tools(_with_system(messages, record.get("system")), record.get("tools"))


def _media(record: dict[str, Any]) -> dict[str, list[Any]]:
    """The pictures and clips beside a record's messages, by kind, in order."""
    heard = next((name for name in UNHEARD if record.get(name)), None)
    if heard is not None:
        raise SampleError(f"the record has sounds ({heard!r}), which no model here hears")
    left = {}
    for kind in KINDS:
        given = [value for name in (kind, f"{kind}s") if (value := record.get(name)) is not None and value != []]
        if len(given) > 1:
            raise SampleError(f"the record has both {kind!r} and '{kind}s'; which of them its messages show cannot be told")
        values = [one for value in given for one in (value if isinstance(value, list) else [value])]
        left[kind] = [_payload(value) for value in values if value is not None]
    return left


def _payload(value: Any) -> Any:
    """A picture; out of the wrapping in which `datasets` gives one that it has not decoded."""
    return (value.get("bytes") or value.get("path") or value) if isinstance(value, dict) else value


def _shown(message: Any, left: dict[str, list[Any]], named: bool) -> Any:
    """A message with the pictures that it shows, taken from those that are left.

    Args:
        named: the record has a column for pictures, so `<image>` in a text stands for one; else it is text like any other.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str) and named:
        content = _parts(content, left)
    elif isinstance(content, list):
        content = [_filled(part, left, named) for part in content]
    else:
        return message
    return {**message, "content": content}


def _filled(part: Any, left: dict[str, list[Any]], named: bool) -> Any:
    """A part with its picture; without the nulls that tables write for what other parts have."""
    if not isinstance(part, dict):
        return part
    part = {name: value for name, value in part.items() if value is not None}
    kind = part.get("type")
    if kind not in left or not named or any(name in part for name in PAYLOADS):
        return part
    if not left[kind]:
        raise SampleError(f"the messages show more {kind}s than the record names")
    return {**part, kind: left[kind].pop(0)}


def _turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    """LLaVA's and ShareGPT's `conversations` as messages."""
    left, out = _media(record), []
    for number, turn in enumerate(record["conversations"], 1):
        if not isinstance(turn, dict) or turn.get("from") not in ROLES:
            raise SampleError(
                f"a turn is from {turn.get('from') if isinstance(turn, dict) else turn!r}; known are {', '.join(ROLES)}"
            )
        if not isinstance(turn.get("value"), str):
            raise SampleError(f"turn {number}, from {turn['from']}, needs a text in `value`, got {turn.get('value')!r:.80}")
        out.append({"role": ROLES[turn["from"]], "content": _parts(turn["value"], left)})
    unused = [kind for kind, values in left.items() if values]
    if unused:
        raise SampleError(f"the record names more {unused[0]}s than its text has <{unused[0]}>")
    return out


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    """Messages after the system prompt beside them, where there is one."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise SampleError(f"a record's `system` is a text, got {system!r:.80}")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise SampleError("the record has two system prompts, its `system` and another in its first message")
    return messages


def _document(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a document in order. OBELICS: two lists of one length, at each place a picture or a text and in the other null. MMC4: a
    list of texts, and for each picture the text that it stands before."""
    if "text_list" in record:
        texts, info = record["text_list"], record.get("image_info") or []
        if not isinstance(texts, list) or not all(isinstance(one, dict) and "image_name" in one for one in info):
            raise SampleError("a document's `text_list` is a list of texts, and each of its `image_info` has an `image_name`")
        before: list[tuple[float, Any, Any]] = [(at, None, text) for at, text in enumerate(texts)]
        before += [(one.get("matched_text_index", 0) - 0.5, one["image_name"], None) for one in info]
        places = [(picture, text) for _, picture, text in sorted(before, key=lambda entry: entry[0])]
    else:
        pictures, texts = record.get("images"), record["texts"]
        if not isinstance(pictures, list) or not isinstance(texts, list) or len(pictures) != len(texts):
            raise SampleError("a document's `images` and `texts` are two lists of one length")
        places = list(zip(pictures, texts, strict=True))
    parts: list[dict[str, Any]] = []
    for at, (picture, text) in enumerate(places):
        if (picture is None) == (text is None):
            raise SampleError(f"place {at} of the document holds {'a picture and a text' if text is not None else 'nothing'}")
        if picture is not None:
            parts.append({"type": "image", "image": _payload(picture)})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += f" {text}"
        else:
            parts.append({"type": "text", "text": str(text)})
    return parts


def _parts(text: str, left: dict[str, list[Any]]) -> str | list[dict[str, Any]]:
    """Text with `<image>` and `<video>` as parts; plain text stays a string. A line break beside a placeholder goes with it."""
    parts: list[dict[str, Any]] = []
    while True:
        found = min(((text.find(f"<{kind}>"), kind) for kind in left if f"<{kind}>" in text), default=None)
        if found is None:
            break
        at, kind = found
        if not left[kind]:
            raise SampleError(f"the text has more <{kind}> than the record names {kind}s")
        before, text = text[:at].removesuffix("\n"), text[at + len(kind) + 2 :].removeprefix("\n")
        parts += [{"type": "text", "text": before}] if before else []
        parts.append({"type": kind, kind: left[kind].pop(0)})
    if not parts:
        return text
    return [*parts, {"type": "text", "text": text}] if text else parts
