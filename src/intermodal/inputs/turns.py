"""Where the assistant's words are in a rendered conversation, in characters.

A template is rendered twice: once as the user would, once with characters that occur nowhere else around what the assistant says. Without
those characters the second text must equal the first, or the template is refused for training; nothing is guessed from token counts.
Calls of tools are objects, which no character fits around: they reach from where the template would write the message's content to the
token that ends the turn. What the template writes between where a reply begins and the words is the assistant's, too: what it thought, or
the signs that it thought nothing (Qwen3's empty think block), for the model has to say that before it comes to the words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from .messages import calls_of, thoughts_apart, thoughts_of
from .replies import Replies, Turn, merged, shows
from .template import ChatTemplate, TemplateError


def find_turns(
    template: ChatTemplate, messages: Sequence[dict[str, Any]], ends: Sequence[str], draws: bool, **variables: Any
) -> tuple[str, list[Turn]]:
    """(text, turns): the rendered conversation, and where in it each message of the assistant is that says something.

    Args:
        ends: the tokens that end a turn, as text.
        draws: the model draws pictures: they are then as much the assistant's as its words.

    Raises:
        TemplateError: the template changes the assistant's words, or leaves a message or what it thought out.
    """
    render = partial(template.render, **variables)
    plain = render(messages)
    turns = _found_turns(render, messages, plain, ends, draws)
    if turns is None:
        apart = thoughts_apart(messages)
        turns = _found_turns(render, apart, plain, ends, draws) if render(apart) == plain else None
    if turns is None:
        thinking = any(shows(message) and "</think>" in json.dumps(message["content"], default=str) for message in messages)
        hint = "; give a thought beside a picture in reasoning_content, with all that is shown after it" if thinking else ""
        raise TemplateError(
            "the chat template changes what the assistant said or leaves it out, so its words cannot be found in the rendered text; "
            f"train with a template that writes assistant messages as they are{hint}"
        )
    return plain, turns


def _found_turns(
    render: Callable[..., str], messages: Sequence[dict[str, Any]], plain: str, ends: Sequence[str], draws: bool
) -> list[Turn] | None:
    """The turns in the rendered text; None where the assistant's words are not in it as they are."""
    everything = plain + json.dumps(messages, default=str, ensure_ascii=False)
    marks = _Marks(*islice((chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in everything), 5))
    # some templates write something before every part: there the marks go into the texts alone
    for edges in (True, False) if not draws and any(map(shows, messages)) else (True,):
        for trim in (False, True):
            found = marks.read(render(marks.on(messages, trim, edges)))
            said = [message for message in messages if _is_marked(message, edges)]
            if found.text != plain or len(found.turns) != len(said):
                continue
            if all(_says(plain, turn, message, trim, draws) for turn, message in zip(found.turns, said, strict=True)):
                return list(_whole_turns(render, messages, found, marks.begin, edges, draws, ends))
    return None


@dataclass
class _Found:
    """A marked text that was read back."""

    text: str = ""
    turns: list[Turn] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)
    """Where messages begin that follow calls of tools."""


@dataclass(frozen=True)
class _Marks:
    """Characters that stand around a message, around each text of one with media, and before a message that follows calls of tools."""

    begin: str
    end: str
    open: str
    close: str
    heard: str

    def on(self, messages: Sequence[dict[str, Any]], trim: bool, edges: bool) -> list[dict[str, Any]]:
        """The messages with their marks.

        Args:
            trim: without the white space around texts, for templates that take it away.
            edges: a message that begins or ends with a medium gets parts of their own for its marks.
        """
        out, after_calls = [], False
        for message in messages:
            content = message.get("content")
            if _is_marked(message, edges):
                content = self._around(content, trim, edges)
            elif after_calls and content:
                content = self._before(content, trim)
            out.append({**message, "content": content} if "content" in message else message)
            after_calls = bool(calls_of(message))
        return out

    def _around(self, content: Any, trim: bool, edges: bool) -> Any:
        if isinstance(content, str):
            return self.begin + self.open + (content.strip() if trim else content) + self.close + self.end
        parts = [dict(part) for part in content]
        texts = [part for part in parts if part.get("type") == "text"]
        if len(texts) == len(parts):  # without media the texts are one
            for part, strip in ((texts[0], str.lstrip), (texts[-1], str.rstrip)) if texts and trim else ():
                part["text"] = strip(part["text"])
            for part in texts[:1]:
                part["text"] = self.open + part["text"]
            for part in texts[-1:]:
                part["text"] += self.close
        else:
            for part in texts:
                part["text"] = self.open + (part["text"].strip() if trim else part["text"]) + self.close
        if edges and parts and parts[0] not in texts:
            parts.insert(0, {"type": "text", "text": self.begin})
        elif texts:
            texts[0]["text"] = self.begin + texts[0]["text"]
        if edges and parts and parts[-1] not in texts:
            parts.append({"type": "text", "text": self.end})
        elif texts:
            texts[-1]["text"] += self.end
        return parts

    def _before(self, content: Any, trim: bool) -> Any:
        if isinstance(content, str):
            return self.heard + (content.strip() if trim else content)
        first = next((part for part in content if part.get("type") == "text"), None)
        return [{**part, "text": self.heard + part["text"]} if part is first else part for part in content]

    def read(self, marked: str) -> _Found:
        """The text without marks, and what was between them."""
        found, start, opened, words, plain = _Found(), 0, 0, [], []
        for character in marked:
            at = len(plain)
            if character == self.begin:
                start, words = at, []
            elif character == self.open:
                opened = at
            elif character == self.close:
                words.append((opened, at))
            elif character == self.end:
                found.turns.append(Turn((start, at), tuple(words)))
            elif character == self.heard:
                found.heard.append(at)
            else:
                plain.append(character)
        found.text = "".join(plain)
        return found


def _is_marked(message: dict[str, Any], edges: bool) -> bool:
    """Whether the assistant says something in a message besides calling tools."""
    content = message.get("content")
    if message.get("role") != "assistant" or (not content and calls_of(message)):
        return False
    return edges or not shows(message) or any(part.get("type") == "text" for part in content or ())


def _says(text: str, turn: Turn, message: dict[str, Any], trim: bool, draws: bool) -> bool:
    """Whether a turn is the message's texts in order; where they are drawn, with the media among them."""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else [part["text"] if part["type"] == "text" else None for part in content or []]
    if None not in parts:
        words = "".join(part for part in parts if part is not None)
        return text[slice(*turn.span)] == (words.strip() if trim else words)
    texts = [part if part is None else part.strip() if trim else part for part in parts]
    if draws:
        pattern = "".join(".+?" if part is None else re.escape(part) for part in texts)
        return re.fullmatch(pattern, text[slice(*turn.span)], re.DOTALL) is not None
    return [text[start:stop] for start, stop in turn.words] == [part for part in texts if part is not None]


def _whole_turns(
    render: Callable[..., str],
    messages: Sequence[dict[str, Any]],
    found: _Found,
    mark: str,
    edges: bool,
    draws: bool,
    ends: Sequence[str],
) -> Iterator[Turn]:
    """The turns that were found, with the calls of tools, which bear no marks."""
    replies = Replies(render, messages, found.text, mark)
    turns, begun = iter(found.turns), sorted([*found.heard, *(turn.span[0] for turn in found.turns)])
    for index, message in enumerate(messages):
        turn = next(turns) if _is_marked(message, edges) else None
        if turn is not None and draws:
            turn = replace(turn, words=(turn.span,))
        if message.get("role") == "assistant" and (calls := calls_of(message)):
            if turn is None:
                start = _place_of_content(render, messages, index, found.text, mark)
                turn = Turn((start, start), ())
            after = turn.span[1]
            stop = min((at for end in ends if (at := found.text.find(end, after)) >= 0), default=len(found.text))
            _check_calls(calls, found.text[after:stop])
            if any(after < at < stop for at in begun):
                raise TemplateError(
                    "the chat template does not end the assistant's turn after its calls of tools: replies would not end"
                )
            turn = Turn((turn.span[0], stop), (*turn.words, (after, stop)))
        if turn is not None:
            yield replies.whole(index, replace(turn, words=merged(turn.words)))
        elif thoughts_of(message):  # it only shows, and what it shows is not marked
            raise TemplateError(
                f"which part of message {index + 1} is what the assistant thought cannot be told by this chat template, for nothing is "
                "said there beside what is shown: give the message some words, take the thought out, or train with another template"
            )


def _place_of_content(render: Callable[..., str], messages: Sequence[dict[str, Any]], index: int, plain: str, mark: str) -> int:
    """Where the words of a message begin that only calls tools: where its content would be, or after the assistant's header.

    Raises:
        TemplateError: the template gives neither away.
    """
    spoken = [{**message, "content": mark} if number == index else message for number, message in enumerate(messages)]
    try:
        before, there, _ = render(spoken).partition(mark)
    except TemplateError:  # there are templates that take either words or calls
        before, there = "", ""
    if not there:
        before = render(messages[:index], reply=True) if index else ""
    if not (there or index) or not plain.startswith(before):
        raise TemplateError("it cannot be told where in the chat template's text the assistant's calls of tools begin")
    return len(before)


def _check_calls(calls: Sequence[dict[str, Any]], text: str) -> None:
    """Raises TemplateError: a call's name, or a text among its arguments, is not written."""
    at = 0
    for call in calls:
        function = call.get("function", call)
        at = text.find(function["name"], at)
        what = f"the assistant's call of {function['name']!r}" if at < 0 else None
        for argument in _texts_in(function.get("arguments")):
            if what is None and argument not in text and json.dumps(argument, ensure_ascii=False)[1:-1] not in text:
                what = f"the argument {argument[:40]!r} of {function['name']!r}"
        if what is not None:
            raise TemplateError(
                f"the chat template leaves out {what}: give the model one that writes `tool_calls`, "
                "model.processor.set_template(text), in a recipe model.template=FILE"
            )
        at += len(function["name"])


def _texts_in(arguments: Any) -> Iterator[str]:
    """The texts among arguments that are given as an object; those given as JSON text are written in more than one way."""
    if isinstance(arguments, dict):
        for value in arguments.values():
            yield from [value] if isinstance(value, str) else _texts_in(value)
