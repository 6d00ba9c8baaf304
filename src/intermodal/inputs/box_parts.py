"""Parts of messages that are boxes, as the text that a model's family writes for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from .boxes import short
from .media import Clip, MediaError, Plan, Planner, kind_of
from .messages import parts_of


def with_boxes_written(
    messages: Sequence[dict[str, Any]], planner: Planner | None, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]
) -> Sequence[dict[str, Any]]:
    """Messages with each box part as a text part.

    Args:
        items: the media of the messages, in the order in which they stand there; a box belongs to the last one before it, or to `item`.

    Raises:
        MediaError: a box belongs to no medium, or cannot be written.
    """
    if not any(part.get("type") == "box" for part in parts_of(messages)):
        return messages
    shown, out = -1, []
    for message in messages:
        parts = message.get("content")
        if isinstance(parts, list):
            written = []
            for part in parts:
                kind = kind_of(part)
                shown += kind not in ("text", "box")
                written.append({"type": "text", "text": _box(part, shown, planner, items, plans)} if kind == "box" else part)
            parts = written
        out.append({**message, "content": parts} if "content" in message else message)
    return out


def _box(
    part: dict[str, Any], shown: int, planner: Planner | None, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]
) -> str:
    number = shown if part.get("item") is None else part["item"]  # tables have null where nothing is said, and 1 as 1.0 beside it
    if isinstance(number, bool) or not (isinstance(number, int) or (isinstance(number, float) and number.is_integer())):
        raise MediaError(
            f"the item of a box part is a number, counted from 0 over all media of the messages, and not {short(number)}"
        )
    number = int(number)
    if planner is None:
        raise MediaError(f"this model takes no pictures, and a box part belongs to one: {short(part)}")
    if part.get("item") is None and number < 0:
        raise MediaError(f'a box part stands before all pictures and clips: put it after its own, or say "item": {short(part)}')
    if not 0 <= number < len(items):
        raise MediaError(
            f"a box part belongs to item {short(number)}, and the conversation shows {len(items)} pictures and clips, counted from 0: "
            f"{short(part)}"
        )
    box: Any = part.get("box")
    label = "" if part.get("label") is None else part["label"]
    try:
        return planner.frame(items[number].size, plans[number]).write(box, label)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise MediaError(f"a box part of item {number} that cannot be written ({error}): {short(part)}") from error
