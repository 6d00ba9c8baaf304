"""Conversations to train on: from files, from captioned pictures, and about scenes."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..errors import SampleError, nearest
from ..inputs.messages import placed, with_tools
from .facts import Facts
from .hub import open_hub, open_pairs
from .questions import SIGN_QUESTION, questions
from .readers import SourceError, open_source
from .scenes import Scenes
from .signs import Signs
from .source import Sample, Source
from .stream import StreamSource
from .tar_streams import is_streamed, open_shards

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
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
    """A streamed record of a conversation: `messages` or LLaVA's `conversations`, its pictures in `images` or `image`.

    Raises:
        SampleError: it holds no conversation, or its messages show other pictures than it has.
    """
    pictures = record.get("images") or record.get("image") or []
    pictures = [_bytes(value) for value in (pictures if isinstance(pictures, list) else [pictures])]
    if not isinstance(record.get("messages"), list):
        return Talk(key, placed(messages_of({**record, "image": None, "images": pictures}), Path()))
    left, messages = iter(pictures), []
    for message in record["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = [
                {name: value for name, value in part.items() if value is not None} for part in content if isinstance(part, dict)
            ]
            content = [
                {"type": "image", "image": next(left, None)} if p.get("type") == "image" and "image" not in p else p for p in parts
            ]
        messages.append({**message, "content": content} if isinstance(message, dict) else message)
    unshown = sum(1 for _ in left)
    if unshown:
        raise SampleError(f"the record has {unshown} pictures more than its messages show")
    return Talk(key, with_tools(placed(messages, Path()), record.get("tools")))


def _bytes(value: Any) -> Any:
    """A picture as `datasets` gives it undecoded."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


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
    """A .jsonl or .json file. A record is `{"messages": [...]}`, LLaVA's `{"image": path, "conversations": [{"from", "value"}]}`, or a
    document of texts and pictures in turn, as OBELICS has them (`images` and `texts`) or MMC4 (`text_list` and `image_info`).

    Picture and video paths are relative to the file's folder.
    """

    def __init__(self, file: Path):
        self.name, self.folder = str(file), file.parent
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise SourceError(f"cannot read {file}: {error}") from error
        if file.suffix == ".jsonl":
            self.records: list[Any] = [
                line for line in text.splitlines() if line.strip()
            ]  # parsed one by one: a bad line is a reject
        else:
            try:
                self.records = json.loads(text)
            except json.JSONDecodeError as error:
                raise SourceError(f"{file} is not JSON: {error}") from error
            if not isinstance(self.records, list):
                raise SourceError(f"{file} holds one object; a list of conversations is wanted")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Talk:
        record = self.records[index]
        if isinstance(record, str):
            try:
                record = json.loads(record)
            except json.JSONDecodeError as error:
                raise SampleError(f"line {index + 1} is not JSON: {error}") from error
        key = f"{self.name}/{record.get('id', index) if isinstance(record, dict) else index}"
        return Talk(key, placed(messages_of(record), self.folder))


def user(picture: Any = None, text: str | None = None) -> dict[str, Any]:
    """A user's message with an optional picture before its text."""
    parts: list[dict[str, Any]] = [] if picture is None else [{"type": "image", "image": picture}]
    return {"role": "user", "content": [*parts, *([] if text is None else [{"type": "text", "text": text}])]}


def messages_of(record: Any) -> list[dict[str, Any]]:
    """A record's messages; LLaVA's `conversations` become messages, each `<image>` and `<video>` a part; a document becomes what the
    assistant says, all of it learned.

    Raises:
        SampleError: none of the forms, an unknown speaker, or other counts of `<image>` and of pictures.
    """
    if isinstance(record, list):
        return record
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        return with_tools(record["messages"], record.get("tools"))
    if isinstance(record, dict) and ("texts" in record or "text_list" in record):
        return [{"role": "assistant", "content": _document(record)}]
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise SampleError("a record needs `messages`, LLaVA's `conversations`, or a document's `images` and `texts`")
    media = {kind: record[kind] if record.get(kind) is not None else record.get(f"{kind}s") for kind in ("image", "video")}
    left = {kind: [] if value is None else list(value) if isinstance(value, list) else [value] for kind, value in media.items()}
    out = []
    for turn in record["conversations"]:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES:
            raise SampleError(
                f"a turn is from {turn.get('from') if isinstance(turn, dict) else turn!r}; known are {', '.join(ROLES)}"
            )
        out.append({"role": ROLES[turn["from"]], "content": _parts(str(turn.get("value", "")), left)})
    unused = [kind for kind, values in left.items() if values]
    if unused:
        raise SampleError(f"the record names more {unused[0]}s than its text has <{unused[0]}>")
    return out


def _document(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a document in order. OBELICS: two lists of one length, at each place a picture or a text and in the other null. MMC4: a
    list of texts, and for each picture the text that it stands before."""
    if "text_list" in record:
        texts, info = record["text_list"], record.get("image_info") or []
        if not isinstance(texts, list) or not all(isinstance(one, dict) and "image_name" in one for one in info):
            raise SampleError("a document's `text_list` is a list of texts, and each of its `image_info` has an `image_name`")
        before: list[tuple[float, Any, Any]] = [(at, None, text) for at, text in enumerate(texts)]
        before += [(one.get("matched_text_index", 0) - 0.5, one["image_name"], None) for one in info]
        places = [(picture, text) for _, picture, text in sorted(before, key=lambda entry: entry[0])]
    else:
        pictures, texts = record.get("images"), record["texts"]
        if not isinstance(pictures, list) or not isinstance(texts, list) or len(pictures) != len(texts):
            raise SampleError("a document's `images` and `texts` are two lists of one length")
        places = list(zip(pictures, texts, strict=True))
    parts: list[dict[str, Any]] = []
    for at, (picture, text) in enumerate(places):
        if (picture is None) == (text is None):
            raise SampleError(f"place {at} of the document holds {'a picture and a text' if text is not None else 'nothing'}")
        if picture is not None:
            parts.append({"type": "image", "image": picture})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += f" {text}"
        else:
            parts.append({"type": "text", "text": str(text)})
    return parts


def _parts(text: str, left: dict[str, list[Any]]) -> str | list[dict[str, Any]]:
    """Text with `<image>` and `<video>` as parts; plain text stays a string. A line break beside a placeholder goes with it."""
    parts: list[dict[str, Any]] = []
    while True:
        found = min(((text.find(f"<{kind}>"), kind) for kind in left if f"<{kind}>" in text), default=None)
        if found is None:
            break
        at, kind = found
        if not left[kind]:
            raise SampleError(f"the text has more <{kind}> than the record names {kind}s")
        before, text = text[:at].removesuffix("\n"), text[at + len(kind) + 2 :].removeprefix("\n")
        parts += [{"type": "text", "text": before}] if before else []
        parts.append({"type": kind, kind: left[kind].pop(0)})
    if not parts:
        return text
    return [*parts, {"type": "text", "text": text}] if text else parts
