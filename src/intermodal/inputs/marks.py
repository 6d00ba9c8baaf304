"""Tokens of a model that draws which no words may spell: they would be read as a code, the begin of a picture or the end of a turn."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from tokenizers import Tokenizer

from .codes import CodePlanner
from .media import MediaError
from .text import spelled


def marks_of(tokenizer: Tokenizer) -> set[int]:
    """Tokens that are no words: special ones, and names like <reserved08706>. The reference takes every name that begins with "<" for
    one (`vocab.py:60-74`), words like "</" and "<=" among them."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return special | {index for name, index in tokenizer.get_vocab().items() if re.fullmatch(r"<reserved\d+>", name)}


def all_marks(tokenizer: Tokenizer, planner: CodePlanner) -> frozenset[int]:
    """Those tokens, the placeholders of pictures, their begin and end, and every code."""
    tokens = planner.image_tokens
    return frozenset([*marks_of(tokenizer), *planner.placeholders.values(), *tokens.ids, tokens.begin, tokens.end])


def refuse_marks(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], marks: Collection[int]) -> None:
    """Refuse a conversation whose words spell a mark, as a placeholder of media is refused: the model would read the token. Neighbouring
    texts are looked at as one, for that is how a template writes them.

    Raises:
        MediaError: names the message and what it spells.
    """
    for number, message in enumerate(messages, 1):
        parts = message.get("content") or ""
        texts = [parts] if isinstance(parts, str) else "".join(part.get("text", "\0") for part in parts).split("\0")
        found = [name for text in texts for name in spelled(tokenizer, text, marks)]
        if found:
            raise MediaError(
                f"message {number} ({message['role']}) spells {found[0]!r}, which the model would read as its own mark and not as words; "
                "leave it out, or write it with a space inside"
            )


def without_marks(tokenizer: Tokenizer, text: str, marks: Collection[int]) -> str:
    """A reply's text without the marks that it spells letter by letter: said again, `refuse_marks` would refuse it."""
    while found := [name for name in spelled(tokenizer, text, marks) if name]:
        for name in found:
            text = text.replace(name, "")
    return text
