"""Where a reply begins in a rendered conversation, and what of the text from there to its first word is the assistant's: what it thought,
or what the template writes there by itself, and not the pictures that it shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .messages import thoughts_of
from .template import TemplateError

TAG = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
"""How templates write what stands for media, and the marks of thoughts."""
Span = tuple[int, int]
"""(first character, the one after the last)."""


@dataclass(frozen=True)
class Turn:
    """One message of the assistant in the rendered text."""

    span: Span
    """From its first to its last word, thought or picture; the token that ends the turn comes right after."""
    words: tuple[Span, ...]
    """What is learned of it: texts and calls of tools, without the media among them unless the model draws; nothing where it only shows."""
    says: bool = True
    """It holds more than white space and what the template writes by itself."""


def merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans in order, those that touch as one."""
    out: list[Span] = []
    for start, stop in spans:
        if out and out[-1][1] == start:
            out[-1] = out[-1][0], stop
        else:
            out.append((start, stop))
    return tuple(out)


def shows(message: dict[str, Any]) -> bool:
    """Whether the assistant shows a picture or a clip in a message."""
    parts = message.get("content")
    return (
        message.get("role") == "assistant" and isinstance(parts, list) and any(part.get("type", "text") != "text" for part in parts)
    )


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _kept(own: str, between: str) -> int | None:
    """After how many characters of `own` something was put into it, which made it `between`: after all of it, before all, or in one place
    within. None where that is not how they differ."""
    first, last = _alike(own, between), _alike(own[::-1], between[::-1])
    if first + last < len(own) or len(own) > len(between):
        return None
    # texts that begin or end alike leave a choice: `</think><image>` is not cut before a `>`
    within = {at for tag in TAG.finditer(between) for at in range(tag.start() + 1, tag.end())}
    places = [len(own), 0, *range(1, len(own))]
    fitting = (kept for kept in places if len(own) - last <= kept <= first)
    return next((kept for kept in fitting if not {kept, len(between) - len(own) + kept} & within), None)


@dataclass
class Replies:
    """Where in a rendered conversation the model would begin to reply: there the template's header of the assistant ends."""

    render: Callable[..., str]
    messages: Sequence[dict[str, Any]]
    plain: str
    mark: str
    """A character that occurs nowhere in it."""
    openings: dict[str, int] = field(default_factory=dict)
    """What was found between the message before and the words of turns without a thought, and how many characters of it are the
    assistant's own."""

    def whole(self, index: int, turn: Turn) -> Turn:
        """Message `index` with what is written before its words, and whether it says anything.

        Raises:
            TemplateError: what the assistant thought is not written there.
        """
        message = self.messages[index]
        thoughts, (start, stop) = thoughts_of(message), turn.span
        begin = start
        if self.header and (thoughts or turn.words):  # nothing is learned of a message that only shows
            begin = self.begin(index, start) if thoughts else self.known_begin(index, start)
        own = [(begin, start)]
        if shows(message) and self.plain[begin:start].strip():
            own = self.beside_media(index, begin, start)
        written = "".join(self.plain[first:last] for first, last in own)
        lost = next((thought for thought in thoughts if thought not in written), None)
        if lost is not None:
            raise TemplateError(
                f"the chat template does not write what the assistant thought ({lost[:40]!r}, in message {index + 1}) between where "
                f"that reply begins and its words{', apart from what it shows' if shows(message) else ''}. Some write it in the last reply "
                "alone: end the conversation with it, take the thought out, or train with a template that writes it"
            )
        says = bool(thoughts) or any(self.plain[first:last].strip() for first, last in turn.words)
        if not written.strip():
            return replace(turn, says=says)
        return Turn((begin, stop), merged([*own, *turn.words]), says)

    def beside_media(self, index: int, begin: int, start: int) -> list[Span]:
        """What of the text from where a reply begins to its first word is the assistant's, where a template may write pictures and clips
        there, too: what it writes there for the same message when nothing is shown. Nothing where the two do not fit each other."""
        silent = {**self.messages[index], "content": [{"type": "text", "text": self.mark}]}
        try:
            before, there, _ = self.render([*self.messages[:index], silent, *self.messages[index + 1 :]]).partition(self.mark)
        except TemplateError:  # it wants something shown
            return [(start, start)]
        own, between = before[begin:], self.plain[begin:start]
        if not there or not before.startswith(self.plain[:begin]):
            return [(start, start)]
        kept = _kept(own, between)
        if kept is None:
            return [(start, start)]
        return [span for span in ((begin, begin + kept), (start - len(own) + kept, start)) if span[0] < span[1]]

    def known_begin(self, index: int, start: int) -> int:
        """As `begin`, of a turn without a thought: the conversation up to it is rendered only where it opens like no turn before it."""
        if self.plain[:start].rstrip().endswith(self.header.strip()):
            return start
        own = next((own for opening, own in self.openings.items() if self.plain.endswith(opening, 0, start)), None)
        return self.begin(index, start) if own is None else start - own

    def begin(self, index: int, start: int) -> int:
        """Where the reply to the messages before message `index` begins, or `start` where the template does not tell."""
        asked = self._asked(index)
        if asked is None:
            return start
        begin = len(asked) if len(asked) <= start and self.plain.startswith(asked) else start
        told = asked.removesuffix(self.header)
        if len(told) < len(asked) and self.plain.startswith(told) and self._plain_words(index):
            opening = self.plain[len(told) : start]
            self.openings |= {opening: start - begin} if opening.strip() else {}
        return begin

    def _plain_words(self, index: int) -> bool:
        """Whether before the words of a message there is what the template writes by itself alone."""
        return not thoughts_of(self.messages[index]) and not shows(self.messages[index])

    @cached_property
    def header(self) -> str:
        """What the template writes before a reply to the first question; nothing where that is white space."""
        first = next(index for index, message in enumerate(self.messages) if message.get("role") == "assistant")
        asked, told = self._asked(first), self._asked(first, reply=False)
        header = asked[len(told) :] if asked is not None and told is not None and asked.startswith(told) else ""
        return header if header.strip() else ""

    def _asked(self, index: int, reply: bool = True) -> str | None:
        try:
            return self.render(self.messages[:index], reply=reply)
        except TemplateError:  # it wants other messages than those alone
            return None
