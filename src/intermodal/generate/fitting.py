"""What of a conversation fits the model's context: old turns may be left out, and never what instructs the model, or the last question."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ..errors import IntermodalError
from ..inputs.box_parts import with_boxes_written
from ..inputs.chat import ChatProcessor, Conversation
from ..inputs.messages import INSTRUCTING, in_lists
from .sample import Sampling


class TooLong(IntermodalError):
    """A conversation does not fit the model's context."""


def fitting(
    processor: ChatProcessor, messages: Sequence[dict[str, Any]], context: int, sampling: Sampling, picture: int = 0
) -> tuple[Conversation, int]:
    """The conversation as tokens, and how many of its messages were left out by `Sampling.too_long`.

    Args:
        picture: tokens that a picture of the reply would take: old messages make room for it too, up to half of the context in all.

    Raises:
        TooLong: it leaves no room for a reply; with the count of each item.
    """
    conversation, dropped = processor.conversation(messages, reply=True), 0
    if sampling.too_long == "drop_oldest":
        room = context - min(sampling.max_new_tokens + picture, context // 2)
        whole = _boxes_as_text(processor, messages, conversation)
        lead = list(takewhile(lambda message: message["role"] in INSTRUCTING, whole))
        turns = [at for at, message in enumerate(whole) if message["role"] == "user"]
        for start in turns[1:]:
            if len(conversation.ids) <= room:
                break
            conversation, dropped = processor.conversation([*lead, *whole[start:]], reply=True), start - len(lead)
    check_length(conversation, context, sampling.max_new_tokens, sampling.too_long == "drop_oldest")
    return conversation, dropped


def _boxes_as_text(
    processor: ChatProcessor, messages: Sequence[dict[str, Any]], conversation: Conversation
) -> Sequence[dict[str, Any]]:
    """Messages with their boxes written: `item` counts over the whole conversation, and would count otherwise over what is left of it."""
    shown = zip(conversation.numbers, conversation.items, conversation.plans, strict=True)
    in_order = sorted(shown, key=lambda entry: entry[0])  # a template may write media in another order than the messages have
    items, plans = [item for _, item, _ in in_order], [plan for _, _, plan in in_order]
    return with_boxes_written(in_lists(messages), processor.planner, items, plans)


def check_length(conversation: Conversation, context: int, new: int, dropping: bool) -> None:
    """Raises TooLong, with the count of each item, when a prompt leaves no room in the context for a reply."""
    total = len(conversation.ids)
    if total < context:
        return
    kinds = [plan.kind for plan in conversation.plans]
    media = [f"{plan.kind} {kinds[: n + 1].count(plan.kind)}: {len(plan)}" for n, plan in enumerate(conversation.plans)]
    text = total - sum(len(plan) for plan in conversation.plans)
    parts = ", ".join([f"text: {text}", *media])
    raise TooLong(
        f"the conversation has {total} tokens ({parts}), the model's context {context}, and a reply of up to {new} must fit too; "
        "leave out turns or media, or make pictures smaller"
        + ("" if dropping else ', or set too_long="drop_oldest" to leave out the oldest turns')
    )
