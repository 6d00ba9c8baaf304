"""Records of conversations, in the forms in which data sets come, as messages: the same from a file and from a stream."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ..errors import SampleError
from ..inputs.messages import KEYS, with_tools

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KINDS = ("image", "video")
UNHEARD = ("audio", "audios")
PAYLOADS = {*KEYS["image"], *KEYS["video"]}
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
        messages = _shown_messages(record)
    elif "texts" in record or "text_list" in record:
        return [{"role": "assistant", "content": _document(record)}]
    elif isinstance(record.get("conversations"), list):
        messages = _turns(record)
    else:
        raise SampleError("a record needs `messages`, LLaVA's `conversations`, or a document's `images` and `texts`")
    return with_tools(_with_system(messages, record.get("system")), record.get("tools"))


def _media(record: dict[str, Any]) -> dict[str, list[Any]]:
    """The pictures and clips beside a record's messages, in order, of each kind of which there are some."""
    heard = next((name for name in UNHEARD if _payloads(record.get(name))), None)
    if heard is not None:
        raise SampleError(f"the record has sounds ({heard!r}), which no model here hears")
    left = {}
    for kind in KINDS:
        columns = [_payloads(record.get(name)) for name in (kind, f"{kind}s")]
        given = [values for values in columns if values]
        if len(given) > 1 and not _same(*given):
            raise SampleError(
                f"the record has both {kind!r} and '{kind}s'; which of them its messages show cannot be told: keep one"
            )
        left |= {kind: given[0]} if given else {}
    return left


def _payloads(column: Any) -> list[Any]:
    """What a column holds: one picture or a list; without what is none, as tables have it in a row of text alone."""
    values = map(_payload, column if isinstance(column, list) else [column])
    return [value for value in values if value is not None]


def _payload(value: Any) -> Any:
    """A picture; out of the wrapping in which `datasets` gives one that it has not decoded. None where there is none."""
    if isinstance(value, dict):
        holds = any(_payload(one) is not None for one in value.values())
        value = value.get("bytes") or value.get("path") or (value if holds else None)
    return None if isinstance(value, str | bytes) and not value.strip() else value


def _same(one: list[Any], other: list[Any]) -> bool:
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # arrays and tensors, which are not compared as one
        return False


def _shown_messages(record: dict[str, Any]) -> list[Any]:
    """A record's `messages` with the pictures and clips that are beside them."""
    given, left = record["messages"], _media(record)
    beside = {kind: len(values) for kind, values in left.items()}
    named = {kind for kind in KINDS if kind in record or f"{kind}s" in record}
    messages = [_shown(message, left, named) for message in given]
    own, taken = _own_kinds(given), {kind for kind, count in beside.items() if len(left[kind]) < count}
    for kind, values in left.items():
        # where the messages bring their pictures with them, a column that says them again is not needed; of a record whose messages show
        # nothing, or some, a model would learn to answer blind
        again = kind not in taken and (kind in own or (bool(own) and not taken))
        if values and not again:
            what = {"image": "pictures", "video": "videos"}[kind]
            raise SampleError(
                f"the record has {len(values)} {what} more than its messages show: show each by a part of type {kind} or by <{kind}> "
                "in a text, or leave it out"
            )
    return messages


def _own_kinds(messages: list[Any]) -> set[str]:
    """Of what kinds messages have parts that bring their own payload."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    media = [part for part in parts if part.get("type") not in ("text", "box") and _brings(part)]
    return {"video" if part.get("type") == "video" or "video" in part else "image" for part in media}


def _brings(part: dict[str, Any]) -> bool:
    return any(_payload(part.get(name)) is not None for name in PAYLOADS)


def _shown(message: Any, left: dict[str, list[Any]], named: Collection[str]) -> Any:
    """A message with the pictures that it shows, taken from those that are left.

    Args:
        named: of which kinds the record has a column, so that parts without a payload and placeholders may stand for what is in it.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        content = _parts(content, left, named)
    elif isinstance(content, list):
        content = [_filled(part, left, named) for part in content]
    else:
        return message
    return {**message, "content": content}


def _filled(part: Any, left: dict[str, list[Any]], named: Collection[str]) -> Any:
    """A part with its picture; without the nulls that tables write for what other parts have."""
    if not isinstance(part, dict):
        return part
    part = {name: value for name, value in part.items() if value is not None and not (name in PAYLOADS and _payload(value) is None)}
    kind = part.get("type", "")
    if not isinstance(kind, str):
        raise SampleError(f"a part's type is a text, such as 'image', got {kind!r:.80}")
    if kind not in KINDS or kind not in named or _brings(part):
        return part
    if not left.get(kind):
        raise SampleError(f"the messages show more {kind}s than the record names")
    return {**part, kind: left[kind].pop(0)}


def _turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    """LLaVA's and ShareGPT's `conversations` as messages."""
    left, out = _media(record), []
    for number, turn in enumerate(record["conversations"], 1):
        speaker = turn.get("from") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(speaker, str) or speaker not in ROLES:
            raise SampleError(f"turn {number} is from {speaker!r:.80}; known are {', '.join(ROLES)}")
        out.append({"role": ROLES[speaker], "content": _parts(_text(turn.get("value"), number, speaker), left, KINDS)})
    unused = [kind for kind, values in left.items() if values]
    if unused:
        raise SampleError(f"the record names more {unused[0]}s than its text has <{unused[0]}>")
    return out


def _text(value: Any, number: int, speaker: str) -> str:
    """What a turn says; a number is how tables of answers have it (not NaN, which they have for nothing)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return str(value)
    if not isinstance(value, str):
        raise SampleError(f"turn {number}, from {speaker}, needs a text in `value`, got {value!r:.80}")
    return value


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    """Messages after the system prompt beside them, where there is one."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise SampleError(f"a record's `system` is a text, got {system!r:.80}")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    said = first.get("content")
    if not isinstance(said, str) or said.strip() != system.strip():
        raise SampleError("the record has two system prompts, its `system` and another in its first message")
    return messages


def _document(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a document in order. OBELICS: two lists of one length, at each place a picture or a text and in the other null. MMC4: a
    list of texts, and for each picture the text that it stands before."""
    if "text_list" in record:
        texts, info = record["text_list"], record.get("image_info") or []
        named = isinstance(info, list) and all(isinstance(one, dict) and "image_name" in one for one in info)
        if not isinstance(texts, list) or not named:
            raise SampleError("a document's `text_list` is a list of texts, and each of its `image_info` has an `image_name`")
        before: list[tuple[float, Any, Any]] = [(at, None, text) for at, text in enumerate(texts)]
        before += [(_stands_before(one) - 0.5, one["image_name"], None) for one in info]
        places = [(picture, text) for _, picture, text in sorted(before, key=lambda entry: entry[0])]
    else:
        pictures, texts = record.get("images"), record["texts"]
        if not isinstance(pictures, list) or not isinstance(texts, list) or len(pictures) != len(texts):
            raise SampleError("a document's `images` and `texts` are two lists of one length")
        places = list(zip(pictures, texts, strict=True))
    if not places:
        raise SampleError("the document is empty: it has neither texts nor pictures")
    parts: list[dict[str, Any]] = []
    for at, (picture, text) in enumerate((_payload(picture), text) for picture, text in places):
        if (picture is None) == (text is None):
            raise SampleError(f"place {at} of the document holds {'a picture and a text' if text is not None else 'nothing'}")
        if picture is not None:
            parts.append({"type": "image", "image": picture})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += f" {text}"
        else:
            parts.append({"type": "text", "text": str(text)})
    return parts


def _stands_before(picture: dict[str, Any]) -> float:
    """The number of the text that a picture of MMC4's stands before; the first where the record does not say."""
    number = picture.get("matched_text_index", 0)
    # tables of numbers with gaps have 1 as 1.0, and NaN in the gaps
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number:
        raise SampleError(f"the `matched_text_index` of {picture['image_name']!r:.80} is the number of a text, got {number!r:.80}")
    return number


def _parts(text: str, left: dict[str, list[Any]], named: Collection[str]) -> str | list[dict[str, Any]]:
    """Text with `<image>` and `<video>` as parts; plain text stays a string. A line break beside a placeholder goes with it.

    Args:
        named: of which kinds the record may have some. Where it has none, `<image>` is a word like any other, but where a line begins or
            ends with it, as data sets write placeholders, its picture is missing.
    """
    missing = next((kind for kind in named if kind not in left and re.search(f"(?m)^<{kind}>|<{kind}>$", text)), None)
    if missing is not None:
        raise SampleError(f"the text has more <{missing}> than the record names {missing}s, of which it has none")
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
