"""Chat templates: a checkpoint's jinja text, found among its files and rendered in a sandbox. Source of the environment: Hugging Face
`utils/chat_template_utils.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, ClassVar

from ..errors import CheckpointError, IntermodalError

OURS, VARIABLES, OWN_FILE = "intermodal", "template_variables", "tokenizer_config.json"
"""Where a model keeps what every conversation tells its template: transformers takes the key along, unread."""
RESERVED = ("messages", "tools", "reply", "add_generation_prompt")
"""What intermodal itself tells a template."""


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
        try:
            return _environment().from_string(self.source)
        except Exception as error:  # jinja2's own errors, and what a text of brackets or a number of digits does to its parser
            raise TemplateError(f"the chat template does not compile: {_why(error)}") from error

    def check(self) -> None:
        """Raises TemplateError: it does not compile."""
        _ = self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "special": self.special}

    @cached_property
    def drops_strings(self) -> bool:
        """Whether messages are heard whose content is a list of parts, and not those whose content is a string: the released LLaVA
        1.5's and OneVision's templates pick the parts of type text, of which a string has none, LLaVA-NeXT's with Mistral fails at one."""
        return not self._hears(lambda text: text) and self._hears(lambda text: [{"type": "text", "text": text}])

    def _hears(self, content: Callable[[str], Any]) -> bool:
        says = {"user": "what one asks", "assistant": "what one answers"}
        try:
            text = self.render([{"role": role, "content": content(said)} for role, said in says.items()])
        except TemplateError:  # it may want something else of messages; that is told when there are some
            return False
        return all(said in text for said in says.values())

    def render(self, messages: Sequence[dict[str, Any]], *, reply: bool = False, **variables: Any) -> str:
        """Messages -> text.

        Args:
            reply: end with the assistant's header, so that a model goes on as the assistant.
            variables: what else a template asks for (`tools`, `enable_thinking`, ...).

        Raises:
            TemplateError: the template refused the messages, in its own words.
        """
        names = {**self.special, "tools": None, "documents": None, **variables}
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=reply, **names)
        except Exception as error:  # a template is someone else's program: 1 // 0, int('x') and [][0] are its refusals, too
            raise TemplateError(f"the chat template refused these messages: {_why(error)}") from error


def _why(error: Exception) -> str:
    """An error's words, with its kind where it is none of jinja2's: a KeyError says the key alone."""
    import jinja2

    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def settings_in(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """What a JSON file of a checkpoint says; nothing where there is none. Raises CheckpointError: it is not JSON."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def template_in(files: dict[str, bytes], settings: dict[str, Any]) -> str | None:
    """A checkpoint's chat template: in a file of its own, a processor's, or the tokenizer's `settings`.

    Raises:
        CheckpointError: the file of its own is not UTF-8, or another is not JSON.
    """
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"chat_template.jinja is not UTF-8: {error}") from error
    for name in ("chat_template.json", "processor_config.json"):
        if text := settings_in(files, name).get("chat_template"):
            return text
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in found}
        return by_name.get("default") or next(iter(by_name.values()), None)
    return found


def beside_messages_tools_reply_and_add_generation_prompt(variables: dict[str, Any]) -> bool:
    """For `Predicate`: names that a template may be told beside what intermodal itself tells it."""
    return not any(name in RESERVED for name in variables)


def variables_in(files: dict[str, bytes]) -> dict[str, Any]:
    """What a checkpoint's conversations tell the template, as `with_variables` wrote it; nothing where it does not say.

    Raises:
        CheckpointError: that is no object, or holds a name that is intermodal's own.
    """
    ours = settings_in(files, OWN_FILE).get(OURS, {})
    found = ours.get(VARIABLES, {}) if isinstance(ours, dict) else None
    if not isinstance(found, dict) or not beside_messages_tools_reply_and_add_generation_prompt(found):
        raise CheckpointError(
            f'{OWN_FILE}: {OURS} is {{"{VARIABLES}": {{NAME: VALUE}}}} with other names than {", ".join(RESERVED)}, got {ours!r:.80}'
        )
    return found


def with_variables(files: dict[str, bytes], variables: dict[str, Any]) -> dict[str, bytes]:
    """A checkpoint's files with what its conversations tell the template; the same where they say that already.

    Raises:
        CheckpointError: a value that JSON cannot write.
    """
    if variables_in(files) == variables:
        return files
    settings = settings_in(files, OWN_FILE)
    ours = {name: value for name, value in settings.pop(OURS, {}).items() if name != VARIABLES}
    ours |= {VARIABLES: variables} if variables else {}
    try:
        text = json.dumps(settings | ({OURS: ours} if ours else {}), indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"processor.variables cannot be saved with the model ({error}): take out what JSON cannot write"
        ) from None
    return {**files, OWN_FILE: f"{text}\n".encode()}
