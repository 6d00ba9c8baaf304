"""Chat templates: a checkpoint's jinja text, rendered in a sandbox, with the place of the assistant's words known exactly.

The words are found by rendering twice: once as the user would, once with each assistant message between two characters that occur
nowhere else. Without those characters the second rendering must equal the first, or the template is refused for training; nothing
is guessed from token counts. Source of the environment: Hugging Face `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, ClassVar

from ..errors import IntermodalError


class TemplateError(IntermodalError):
    """A chat template that cannot be read or rendered, or that hides the assistant's words."""


@lru_cache(maxsize=1)
def _environment():
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's part in some templates; it renders as what is inside."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller):
            return caller()

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """One template with the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special: dict[str, str] | None = None):
        self.source, self.special = source, special or {}

    @cached_property
    def _compiled(self):
        import jinja2

        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error

    def check(self) -> None:
        """Raises TemplateError: it does not compile."""
        _ = self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "special": self.special}

    @cached_property
    def drops_strings(self) -> bool:
        """Whether a message whose content is a string, not a list of parts, would be left out, as the released LLaVA 1.5's and OneVision's
        templates do: they pick the parts of type text, of which a string has none."""
        says = ("what one asks", "what one answers")
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), says, strict=True)]
        try:
            text = self.render(messages)
        except TemplateError:  # it may want something else of messages; that is told when there are some
            return False
        return not all(said in text for said in says)

    def render(self, messages: Sequence[dict[str, Any]], *, reply: bool = False, **variables: Any) -> str:
        """Messages -> text.

        Args:
            reply: end with the assistant's header, so that a model goes on as the assistant.
            variables: what else a template asks for (`tools`, `enable_thinking`, ...).

        Raises:
            TemplateError: the template refused the messages, in its own words.
        """
        import jinja2

        names = {**self.special, "tools": None, "documents": None, **variables}
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=reply, **names)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise TemplateError(f"the chat template refused these messages: {error}") from error

    def render_marked(self, messages: Sequence[dict[str, Any]], **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """(text, spans): the text of `render` and, for each assistant message, where its words are in it, in characters.

        Raises:
            TemplateError: the template changes the assistant's words, or leaves a message out.
        """
        plain = self.render(messages, **variables)
        everything = plain + json.dumps(messages, default=str, ensure_ascii=False)
        marks = list(islice((chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in everything), 2))
        words = [_parts(message) for message in messages if message.get("role") == "assistant"]
        for trim in (False, True):
            marked = self.render(_with_marks(messages, marks, trim), **variables)
            if marked.replace(marks[0], "").replace(marks[1], "") != plain:
                continue
            spans, at, start = [], 0, 0
            for character in marked:
                if character == marks[0]:
                    start = at
                elif character == marks[1]:
                    spans.append((start, at))
                else:
                    at += 1
            found = [plain[start:stop] for start, stop in spans]
            if len(found) == len(words) and all(_says(text, parts, trim) for text, parts in zip(found, words, strict=True)):
                return plain, spans
        raise TemplateError(
            "the chat template changes what the assistant said or leaves it out, so its words cannot be found in the rendered text; "
            "train with a template that writes assistant messages as they are"
        )


def _parts(message: dict[str, Any]) -> list[str | None]:
    """What a message says: its texts, and None for what is not text."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] if part.get("type") == "text" else None for part in content or []]


def _says(found: str, parts: Sequence[str | None], trim: bool) -> bool:
    """Whether a rendered message is its texts in order, with anything where media are."""
    if None not in parts:
        words = "".join(text for text in parts if text is not None)
        return found == (words.strip() if trim else words)
    pattern = "".join(".+?" if text is None else re.escape(text) for text in parts)
    return re.fullmatch(pattern, found, re.DOTALL) is not None


def _with_marks(messages: Sequence[dict[str, Any]], marks: Sequence[str], trim: bool) -> list[dict[str, Any]]:
    """The messages with each assistant's words between two marks, without the white space around them if `trim`."""
    (begin, end), out = marks, copy.deepcopy(list(messages))
    for message in out:
        if message.get("role") != "assistant":
            continue
        content = message.get("content")
        if isinstance(content, str):
            message["content"] = begin + (content.strip() if trim else content) + end
            continue
        texts = [part for part in content or [] if part.get("type") == "text"]
        if content and len(texts) < len(content):  # a message that draws begins and ends with its first and last part
            message["content"] = [{"type": "text", "text": begin}, *content, {"type": "text", "text": end}]
        elif texts:
            if trim:
                texts[0]["text"], texts[-1]["text"] = texts[0]["text"].lstrip(), texts[-1]["text"].rstrip()
            texts[0]["text"] = begin + texts[0]["text"]
            texts[-1]["text"] += end
    return out
