"""Chat templates: a checkpoint's jinja text, rendered in a sandbox. Source of the environment: Hugging Face
`utils/chat_template_utils.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
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
