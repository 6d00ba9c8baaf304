"""Replies to a file of conversations, one JSON object a line; a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..errors import IntermodalError
from ..models.generative import Generative
from .engine import fitting
from .sample import sampling_of

CHUNK = 64
"""Conversations that are loaded, and then written, together."""


@dataclass
class Counts:
    written: int = 0
    reused: int = 0
    rejected: int = 0


def reply_to_file(model: Generative, source: Path, out: Path, *, slots: int = 16, progress: bool = True, **settings: Any) -> Counts:
    """Read `source` and append a line to `out` for each conversation: `{"line", "id", "reply", "finish", "usage"}`.

    A line of `source` is `{"messages": [...]}`, with an "id" if wanted; paths of pictures are relative to the file. A line that cannot be
    used gives `{"line", "error"}` and is counted.

    Raises:
        IntermodalError: `source` does not exist, or `out` is not such a file.
    """
    if not source.exists():
        raise IntermodalError(f"{source} does not exist")
    done, counts = _finished(out), Counts()
    lines = [(number, text) for number, text in enumerate(source.read_text().splitlines(), 1) if text.strip()]
    counts.reused = sum(number in done for number, _ in lines)
    lines = [(number, text) for number, text in lines if number not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file, Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("replying", total=len(lines))
        for start in range(0, len(lines), CHUNK):
            for row in _chunk(model, lines[start : start + CHUNK], source.parent, slots, settings):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts.rejected += "error" in row
                counts.written += "error" not in row
                bar.advance(task)
            file.flush()
    return counts


def _chunk(
    model: Generative, lines: list[tuple[int, str]], folder: Path, slots: int, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    usable: list[tuple[int, dict[str, Any]]] = []
    for number, text in lines:
        try:
            sample = read_sample(text, folder)
            assert model.processor is not None
            # what is wrong with one conversation must not stop the others
            fitting(model.processor, sample["messages"], model.config_text.context, sampling_of(settings))
            usable.append((number, sample))
        except IntermodalError as error:
            yield {"line": number, "error": str(error)}
    replies = model.generate_batch([sample["messages"] for _, sample in usable], slots=slots, **settings)
    for (number, sample), reply in zip(usable, replies, strict=True):
        name = {"id": sample["id"]} if "id" in sample else {}
        yield {"line": number, **name, "reply": reply.text, "finish": reply.finish, "usage": reply.usage}


def read_sample(text: str, folder: Path) -> dict[str, Any]:
    """One line of a file of conversations, with paths made absolute.

    Raises:
        IntermodalError: not JSON, or no messages.
    """
    try:
        sample = json.loads(text)
    except json.JSONDecodeError as error:
        raise IntermodalError(f"not JSON: {error}") from None
    if not isinstance(sample, dict) or not isinstance(sample.get("messages"), list) or not sample["messages"]:
        raise IntermodalError('a line must be {"messages": [{"role": "user", "content": ...}, ...]}')
    for message in sample["messages"]:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise IntermodalError(f"a message needs a role and a content, got {json.dumps(message)[:80]}")
        for part in message["content"] if isinstance(message["content"], list) else []:
            for kind in ("image", "video"):
                value = part.get(kind)
                if isinstance(value, str) and not value.startswith(("data:", "http:", "https:", "file:", "/")):
                    part[kind] = str(folder / value)
    return sample


def _finished(out: Path) -> set[int]:
    """Lines that an earlier run replied to. A last line cut short by a kill is dropped."""
    if not out.exists():
        return set()
    rows, kept = [], []
    for text in out.read_text().splitlines():
        try:
            row = json.loads(text)
            rows.append(int(row["line"]))
            kept.append(text)
        except (json.JSONDecodeError, KeyError, TypeError):
            if kept and text is not None:
                continue
            raise IntermodalError(f"{out} exists and is not a file of replies; give another --out") from None
    out.write_text("".join(text + "\n" for text in kept))
    return set(rows)
