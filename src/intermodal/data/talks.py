"""Conversations to train on: from files, from captioned pictures, and about scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..errors import SampleError, nearest
from ..inputs.json_lines import json_lines, json_of
from ..inputs.messages import placed
from .facts import Facts
from .hub import open_hub, open_pairs
from .questions import SIGN_QUESTION, questions
from .readers import SourceError, open_source
from .scenes import Scenes
from .signs import Signs
from .source import Sample, Source
from .stream import StreamSource
from .talk_records import messages_of
from .tar_streams import is_streamed, open_shards

FILES = (".jsonl", ".json")
ALONE = "picture alone"
"""In a conversation's meta data: only its first picture is learned, with nothing before it."""


@dataclass
class Talk:
    """One conversation: OpenAI-style messages, pictures and clips inside."""

    key: str
    messages: list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)


class TalkSource(Protocol):
    """Conversations by number; must survive pickling into a worker."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Talk:
        """Conversation number `index`. Raises SampleError when that one cannot be used."""
        ...


def open_talks(spec: str, *, side: int = 64, seed: int = 0, allow_urls: bool = False) -> TalkSource | StreamSource:
    """Conversations from their name on the command line.

    Args:
        spec: `captions:SOURCE` shows a picture and says its caption, for any source of `readers.open_source`;
            `draws:SOURCE` asks for a caption's picture, which the assistant draws (native models);
            `questions:scenes:core?...` asks about scenes, `questions:signs?...` what a sign says (`blind:...` the same without the
            picture); `steps:scenes:core?...` draws scenes of two groups in two steps, words and pictures in turn;
            or a .jsonl or .json file of `messages`, of LLaVA's `conversations` or of documents (`FileTalks`), or `hf:OWNER/NAME[:SPLIT]`
            with such records.
        side: pixels of a side for sources that draw their pictures.
        allow_urls: fetch pictures that a table of captions names by http(s) address.

    Raises:
        SourceError: nothing there, or nothing readable.
    """
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return open_hub(rest, seed=seed, to_sample=record_talk)
    if kind in ("captions", "draws"):
        make = CaptionTalks if kind == "captions" else DrawTalks
        if rest.startswith("hf:"):
            return open_pairs(rest[3:], seed=seed, allow_urls=allow_urls, to_talk=partial(_pair_talk, make))
        if is_streamed(rest):
            return open_shards(rest, seed=seed, to_talk=partial(_pair_talk, make))
        source = open_source(rest, side=side, seed=seed, allow_urls=allow_urls)
        assert isinstance(source, Source)  # streams are above
        return make(source)
    if kind in ("questions", "blind"):
        source = open_source(rest, side=side, seed=seed)
        if isinstance(source, Signs):
            return SignTalks(source, blind=kind == "blind")
        if not isinstance(source, Scenes):
            raise SourceError(f"{spec!r}: questions are made from facts: {kind}:scenes:core, {kind}:scenes:all or {kind}:signs")
        return SceneTalks(source, blind=kind == "blind")
    if kind == "steps":
        source = open_source(rest, side=side, seed=seed)
        if not isinstance(source, Scenes):
            raise SourceError(f"{spec!r}: steps are made from facts: steps:scenes:core or steps:scenes:all")
        return StepTalks(Scenes(replace(source.config, pair_share=1.0)))
    if Path(spec).suffix in FILES:
        return FileTalks(Path(spec).expanduser())
    raise SourceError(
        f"{spec!r} holds no conversations: captions:SOURCE, draws:SOURCE, questions:scenes:core, a .jsonl or a .json file"
        f"{nearest(kind, ('captions', 'draws', 'questions', 'steps'))}"
    )


@dataclass
class PairTalks:
    """Conversations from pictures with captions."""

    source: Source
    kind = ""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.source.name}"

    @property
    def problems(self) -> list[tuple[str, str]]:
        """What of the source could not be read at all."""
        return getattr(self.source, "problems", [])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Talk:
        sample = self.source[index]
        return self.talk(sample, random.Random(f"{self.name}/{index}"))

    @classmethod
    def talk(cls, sample: Sample, rng: random.Random) -> Talk:
        """A conversation about a sample, with one of its captions. Raises SampleError: it has none."""
        texts = [text for text in sample.texts if text.strip()]
        if not texts:
            raise SampleError("no caption")
        return cls.about(sample, rng.choice(texts), rng)

    @classmethod
    def about(cls, sample: Sample, caption: str, rng: random.Random) -> Talk:
        raise NotImplementedError


class CaptionTalks(PairTalks):
    """A picture, and the assistant says its caption (stage 1 of LLaVA, in its plain form)."""

    kind = "captions"

    @classmethod
    def about(cls, sample: Sample, caption: str, rng: random.Random) -> Talk:
        return Talk(sample.key, [user(sample.image), {"role": "assistant", "content": caption}], sample.meta)


class DrawTalks(PairTalks):
    """A caption, and the assistant draws it. One in ten comes without its caption, which guidance needs to compare with."""

    kind = "draws"
    alone = 0.1

    @classmethod
    def about(cls, sample: Sample, caption: str, rng: random.Random) -> Talk:
        drawn = {"role": "assistant", "content": [{"type": "image", "image": sample.image}]}
        return Talk(sample.key, [user(None, f"draw {caption}"), drawn], {**sample.meta, ALONE: rng.random() < cls.alone})


def _pair_talk(make: type[PairTalks], key: str, sample: Sample) -> Talk:
    return make.talk(sample, random.Random(key))


def record_talk(key: str, record: dict[str, Any]) -> Talk:
    """A streamed record of a conversation.

    Raises:
        SampleError: as `messages_of` and `placed`.
    """
    return Talk(key, placed(messages_of(record), Path()))


@dataclass
class SceneTalks:
    """All questions about one scene, in random order, as one conversation; the picture is in the first."""

    scenes: Scenes
    blind: bool = False
    """Leave the picture out: what can be answered from the questions alone."""

    @property
    def name(self) -> str:
        return f"{'blind' if self.blind else 'questions'}-{self.scenes.name}"

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Talk:
        scene = None if self.blind else self.scenes.scene(index)
        asked = questions(scene.facts if scene else self.scenes.facts(index))
        random.Random(f"{self.scenes.name}/questions/{index}").shuffle(asked)
        messages: list[dict[str, Any]] = []
        for number, question in enumerate(asked):
            picture = None if number or scene is None else scene.image
            messages += [user(picture, question.text), {"role": "assistant", "content": question.answer}]
        return Talk(f"{self.name}/{index}", messages, scene.truth() if scene else {})


@dataclass
class StepTalks:
    """A scene of two groups, which the assistant draws in two steps: words, a picture of the first group, words, the whole picture."""

    scenes: Scenes

    @property
    def name(self) -> str:
        return f"steps-{self.scenes.name}"

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Talk:
        facts = self.scenes.facts(index)
        first, second = (self.scenes.scene(index, groups).image for groups in (1, None))
        said = [
            {"type": "text", "text": f"first {facts.groups[0].phrase()}"},
            {"type": "image", "image": first},
            {"type": "text", "text": f"then {facts.caption()}"},
            {"type": "image", "image": second},
        ]
        return Talk(f"{self.name}/{index}", [asked_for_steps(facts), {"role": "assistant", "content": said}])


def asked_for_steps(facts: Facts) -> dict[str, Any]:
    return user(None, f"show the steps : {facts.caption()}")


@dataclass
class SignTalks:
    """A sign, and what it says."""

    signs: Signs
    blind: bool = False
    """As in `SceneTalks`."""

    @property
    def name(self) -> str:
        return f"{'blind' if self.blind else 'questions'}-{self.signs.name}"

    def __len__(self) -> int:
        return len(self.signs)

    def __getitem__(self, index: int) -> Talk:
        sign = None if self.blind else self.signs.sign(index)
        word = sign.word if sign else self.signs.word(index)
        messages = [user(sign.image if sign else None, SIGN_QUESTION), {"role": "assistant", "content": word}]
        return Talk(f"{self.name}/{index}", messages, {"word": word} | ({"height": sign.height} if sign else {}))


class FileTalks:
    """A .jsonl or .json file of records that `messages_of` reads. Picture and video paths are relative to the file's folder."""

    def __init__(self, file: Path):
        self.name, self.folder = str(file), file.parent
        try:
            data = file.read_bytes()
        except OSError as error:
            raise SourceError(f"cannot read {file}: {error}") from error
        self.by_line = file.suffix == ".jsonl"
        """The records are lines and their numbers, parsed when their turn comes: a bad one is a reject."""
        self.records: list[Any]
        if self.by_line:
            self.records = json_lines(data)
        else:
            try:
                self.records = json_of(data)
            except SampleError as error:
                raise SourceError(f"{file} is {error}") from error
            if not isinstance(self.records, list):
                raise SourceError(f"{file} holds one object; a list of conversations is wanted")
        if not self.records:
            raise SourceError(f"{file} holds no conversations: it is empty")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Talk:
        record = self.records[index]
        if self.by_line:
            number, line = record
            try:
                record = json_of(line)
            except SampleError as error:
                raise SampleError(f"line {number} is {error}") from error
        key = f"{self.name}/{record.get('id', index) if isinstance(record, dict) else index}"
        return Talk(key, placed(messages_of(record), self.folder))


def user(picture: Any = None, text: str | None = None) -> dict[str, Any]:
    """A user's message with an optional picture before its text."""
    parts: list[dict[str, Any]] = [] if picture is None else [{"type": "image", "image": picture}]
    return {"role": "user", "content": [*parts, *([] if text is None else [{"type": "text", "text": text}])]}
