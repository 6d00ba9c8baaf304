"""Replies to a file of conversations, one JSON object a line; a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..data.talk_records import messages_of
from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor
from ..inputs.json_lines import json_lines, json_of
from ..inputs.messages import placed
from ..inputs.video import Sampling as Frames
from ..models.generative import Generative
from .engine import Reply, finished
from .sample import sampling_of


@dataclass
class Counts:
    written: int = 0
    reused: int = 0
    rejected: int = 0


def reply_to_file(model: Generative, source: Path, out: Path, *, slots: int = 16, progress: bool = True, **settings: Any) -> Counts:
    """Read `source` and append a line to `out` for each conversation, as it is finished: `{"line", "id", "reply", "finish", "usage"}`.

    A line of `source` is `{"messages": [...]}`, with an "id", "images", a "system" prompt and "tools" if wanted, as `messages_of` reads
    them; paths of pictures are relative to the file. A line that cannot be used gives `{"line", "error"}`, is counted, and is tried again
    by the next run. Pictures that the model draws are written beside `out` and named, with the texts between them, in `"segments"`.
    `"of"` names the conversation and the settings, so that a reply is never taken for that of another; the model is not looked at.

    Raises:
        IntermodalError: `source` does not exist, a setting is wrong, or `out` is no such file, or one of other conversations or settings.
    """
    if not source.exists():
        raise IntermodalError(f"{source} does not exist")
    sampling = sampling_of(settings)
    sampling.check()
    lines = json_lines(source.read_bytes())
    asked = f"{sampling}{_reading(model.processor)}"
    names = {number: _name(text, asked) for number, text in lines}
    done = _earlier(out, names)
    counts = Counts(reused=sum(number in done for number, _ in lines))
    left = [(number, text) for number, text in lines if number not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    samples = _Samples([text for _, text in left], source.parent)
    with out.open("a", encoding="utf-8") as file, Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("replying", total=len(left))
        for index, reply in finished(model, samples, sampling, slots=slots):
            number = left[index][0]
            row: dict[str, Any] = {"line": number, "of": names[number]}
            if isinstance(reply, IntermodalError):
                row |= {"error": str(reply)}
                counts.rejected += 1
            else:
                row |= samples.id_of(index) | {"reply": reply.text, "finish": reply.finish, "usage": reply.usage}
                row |= {"segments": _with_files(reply, out, number)} if reply.images else {}
                row |= {"note": reply.note} if reply.note else {}
                counts.written += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            bar.advance(task)
    return counts


class _Samples(Sequence):
    """The messages of each line, read when their turn comes."""

    def __init__(self, lines: list[bytes], folder: Path):
        self.lines, self.folder = lines, folder

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return read_sample(self.lines[index], self.folder)["messages"]

    def id_of(self, index: int) -> dict[str, Any]:
        sample = json_of(self.lines[index])
        return {"id": sample["id"]} if "id" in sample else {}


def read_sample(text: bytes, folder: Path) -> dict[str, Any]:
    """One line of a file of conversations, with paths taken from `folder`, its messages with its pictures and tools.

    Raises:
        IntermodalError: not JSON, no messages, or pictures or tools that do not fit them.
    """
    sample = json_of(text)
    if not isinstance(sample, dict) or "messages" not in sample:
        raise IntermodalError('a line must be {"messages": [{"role": "user", "content": ...}, ...]}')
    given = sample["messages"]  # where it is no list, `placed` says what is wrong
    return {**sample, "messages": placed(messages_of(sample) if isinstance(given, list) else given, folder)}


def _name(text: bytes, asked: str) -> str:
    return hashlib.blake2b(text.strip() + f"\n{asked}".encode(), digest_size=6).hexdigest()


def _reading(processor: ChatProcessor | None) -> str:
    """How conversations are read where that is not the model's own way, as text."""
    if processor is None:
        return ""
    video, own = (found or Frames() for found in (processor.video, getattr(processor.planner, "sampling", None)))
    changed: list[Any] = [] if video == own else [video]
    changed += [processor.variables] if processor.variables else []
    return "".join(f"\n{setting}" for setting in changed)


def _pictures_of(out: Path) -> Path:
    """Where the pictures of a file of replies go: another folder for each file."""
    return out.with_name(f"{out.stem}-pictures" if out.suffix == ".jsonl" else f"{out.name}.pictures")


def _with_files(reply: Reply, out: Path, number: int) -> list[list[str]]:
    """The reply's segments, pictures written as files and named by their path from `out`'s folder."""
    folder = _pictures_of(out)
    folder.mkdir(exist_ok=True)
    segments = []
    for kind, value in reply.segments:
        if kind == "image":
            file = folder / f"{number}-{sum(seen == 'image' for seen, _ in segments) + 1}.png"
            value.save(file)
            value = f"{folder.name}/{file.name}"
        segments.append([kind, value])
    return segments


def _earlier(out: Path, names: dict[int, str]) -> set[int]:
    """Lines that an earlier run replied to. A last row cut short by a kill, rows of errors, and those of which a picture is gone, are taken
    out of the file.

    Raises:
        IntermodalError: the file holds something else, or replies to other conversations or by other settings.
    """
    if not out.exists():
        return set()
    *whole, last = out.read_bytes().split(b"\n")
    begun = b'{"line": '
    foreign = IntermodalError(f"{out} exists and is not a file of replies; give another --out")
    if not (last.startswith(begun) or begun.startswith(last)):
        raise foreign
    kept, done = [], set()
    for raw in whole:
        try:
            row = json.loads(raw)
            number, name = row["line"], row["of"]
        except (ValueError, KeyError, TypeError):
            raise foreign from None
        if "error" in row:
            continue
        if names.get(number) != name:
            raise IntermodalError(
                f"{out}, line {number}: made from another conversation or by other settings than are asked for now; give another --out"
            )
        drawn = [value for kind, value in row.get("segments", []) if kind == "image"]
        if not all((out.parent / name).exists() for name in drawn):
            continue
        kept.append(raw)
        done.add(number)
    if last or len(kept) != len(whole):
        part = out.with_name(out.name + ".part")
        part.write_bytes(b"".join(raw + b"\n" for raw in kept))
        part.replace(out)
    return done
