"""What must be true of a conversation before it is used: the template writes what was said to the model, and what it would teach is the
assistant's words and the ends of its turns, exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import IntermodalError
from .messages import INSTRUCTING, as_parts, calls_of, with_null_content
from .template import ChatTemplate, TemplateError
from .turns import Turn, find_turns

if TYPE_CHECKING:
    from .chat import Conversation


class NoSupervision(IntermodalError):
    """A conversation from which nothing can be learned, or whose loss mask is not the assistant's words."""


def rendered_whole(
    template: ChatTemplate, messages: Sequence[dict[str, Any]], ends: Sequence[str], draws: bool, reply: bool, **variables: Any
) -> tuple[str, list[Turn]]:
    """(text, turns) as of `find_turns`, nothing that was said lost; no turns where a reply is wanted.

    Raises:
        TemplateError: as `find_turns` and `check_heard`.
    """

    def rendered(form: Sequence[dict[str, Any]]) -> tuple[str, list[Turn]]:
        whole = (
            (template.render(form, reply=True, **variables), []) if reply else find_turns(template, form, ends, draws, **variables)
        )
        check_heard(template, form, whole[0], reply=reply, **variables)
        return whole

    try:
        return rendered(messages)
    except TemplateError as error:
        nulled = with_null_content(messages)
        if nulled == messages:
            raise
        try:
            return rendered(nulled)
        except TemplateError:
            raise error from None


def check_heard(
    template: ChatTemplate, messages: Sequence[dict[str, Any]], text: str, *, tools: Any = None, **variables: Any
) -> None:
    """Look for what the model was told in the rendered text: some templates look for parts of another kind, or know no system prompt or
    no tools.

    Args:
        text: what the template made of the messages.
        variables: what else it was given.

    Raises:
        TemplateError: it says nothing of what a user or a tool said, of a system prompt, of a call, or of the tools that there are.
    """
    lost = None
    for message in messages:
        parts = as_parts(message.get("content")) if message["role"] in ("user", "tool") else []
        for words in (part["text"].strip() for part in parts if part["type"] == "text"):
            # what a tool says may be written as JSON text
            if words not in text and not (message["role"] == "tool" and json.dumps(words, ensure_ascii=False)[1:-1] in text):
                lost = f"what the {message['role']} said ({words[:40]!r})"

    def says_as_much(fewer: Sequence[dict[str, Any]], **given: Any) -> bool:
        try:
            return template.render(fewer, **given) == text
        except TemplateError:  # it misses them
            return False

    # not by its words, of which some templates take settings ("/no_think") out; and a template may write this very prompt by itself where
    # none is given, as Qwen2's does: then it hears other words
    untold = [message for message in messages if not _prompts(message)]
    if 0 < len(untold) < len(messages) and says_as_much(untold, tools=tools, **variables):
        others = [_reworded(message) if _prompts(message) else message for message in messages]
        lost = "the system prompt" if says_as_much(others, tools=tools, **variables) else lost
    if any(map(calls_of, messages)):
        uncalled = [{name: said for name, said in message.items() if name != "tool_calls"} for message in messages]
        lost = "the assistant's calls of tools" if says_as_much(uncalled, tools=tools, **variables) else lost
    if tools and says_as_much(messages, **variables):
        lost = "the tools of the conversation"
    if lost:
        raise TemplateError(
            f"the chat template leaves out {lost}: give the model one that writes such messages, "
            "model.processor.set_template(text), in a recipe model.template=FILE"
        )


def _prompts(message: dict[str, Any]) -> bool:
    """Whether a message is a system prompt that says something."""
    parts = as_parts(message.get("content")) or [] if message["role"] in INSTRUCTING else []
    return any(part["type"] != "text" or part["text"].strip() for part in parts)


def _reworded(message: dict[str, Any]) -> dict[str, Any]:
    """A message that says something else, in a content of the same form."""
    words = "Say something else."
    return {**message, "content": words if isinstance(message["content"], str) else as_parts(words)}


def check_mask(
    conversation: Conversation,
    decode: Callable[[Sequence[int]], str],
    normalise: Callable[[str], str],
    ends: dict[int, str],
    media: Sequence[str],
    draws: bool,
) -> None:
    """Compare what is supervised with what the assistant said, turn by turn and in order.

    Args:
        decode: ids -> text, special tokens included.
        normalise: what the tokenizer does to all text first (Qwen's composes accents): texts that it makes equal are equal to the model.
        ends: the tokens that end a turn, and how they are written.
        media: what stands for a picture or clip in the rendered text.
        draws: the model draws pictures; else no token of one may be supervised.

    Raises:
        NoSupervision: a turn has no end token, the supervised tokens do not spell the assistant's words, or something else is supervised.
    """
    placeholders = re.compile("|".join(map(re.escape, media)) or "(?!)")
    _check_media(conversation, placeholders if draws else None)
    runs = supervised_runs(conversation, ends)
    for turn in conversation.turns:
        if not turn.words:
            continue
        texts = [conversation.text[start:stop] for start, stop in turn.words]
        parts = [part.strip() for text in texts for part in placeholders.split(text)]
        # a picture between the last word and the end of the turn parts them
        apart = not any(parts) or not parts[-1] or turn.words[-1][1] < turn.span[1]
        wanted = [part for part in parts if part]
        said = "".join(texts)
        spelled, ended = [], False
        while runs and not ended and (len(spelled) < len(wanted) or (apart and _only_ends(runs[0], ends, decode))):
            run = runs.pop(0)
            ended = run[-1] in ends
            words = decode(run[:-1] if ended else run).strip()
            spelled += [words] if words else []
        if spelled != wanted and [*map(normalise, spelled)] != [*map(normalise, wanted)]:
            raise NoSupervision(f"the supervised tokens spell {spelled!r:.80}, the assistant said {said[:80]!r}")
        if not ended:
            raise NoSupervision(f"no end-of-turn token ({', '.join(ends.values())}) follows {said[-40:]!r}: replies would not end")
    if runs:
        raise NoSupervision(
            f"{len(conversation.turns)} assistant messages, and beyond them tokens are supervised that spell {decode(runs[0])!r:.80}"
        )


def _check_media(conversation: Conversation, placeholders: re.Pattern[str] | None) -> None:
    """Raises NoSupervision: media are supervised that the assistant does not draw, or one that it draws is not wholly."""
    drawn = 0
    if placeholders is not None:
        words = (conversation.text[start:stop] for turn in conversation.turns for start, stop in turn.words)
        drawn = sum(len(placeholders.findall(text)) for text in words)
    learned = [
        conversation.supervised[start : start + sum(len(piece) for piece in run)] for start, run in conversation.expanded.runs
    ]
    if [sum(map(any, learned)), sum(map(all, learned))] != [drawn, drawn]:
        raise NoSupervision(f"{sum(map(any, learned))} runs of tokens of media are supervised, and the assistant draws {drawn}")


def _only_ends(run: Sequence[int], ends: dict[int, str], decode: Callable[[Sequence[int]], str]) -> bool:
    """Whether a run is the end of a turn and at most white space before it."""
    return run[-1] in ends and not decode(run[:-1]).strip()


def supervised_runs(conversation: Conversation, ends: dict[int, str]) -> list[list[int]]:
    """The supervised tokens that are text, in runs of neighbours; a token that ends a turn ends a run."""
    out: list[list[int]] = []
    last = -2
    for index, (token, learned) in enumerate(zip(conversation.ids, conversation.supervised, strict=True)):
        if learned and conversation.expanded.source[index] >= 0:
            if index != last + 1 or (out and out[-1][-1] in ends):
                out.append([])
            out[-1].append(token)
            last = index
    return out
