"""Generation: conversations in, replies out; many at once, each with its own cache slot, sampler and stop rule.

A waiting conversation takes a slot as soon as one is free; prompts of new arrivals are read together, packed, and every step then
adds one token to all that are under way. In float32 nothing about a reply depends on who shares the batch, nor in bf16 do the kernel's
steps (`kernels.decode`); PyTorch's products may round otherwise in bf16 with other rows, so that near ties fall the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from ..batch import TokenBatch
from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor
from ..inputs.codes import CodePlanner
from ..inputs.marks import all_marks, marks_of
from ..inputs.vision_cache import MemoryCache
from ..kernels.decode import DecodeStep
from ..models.generative import Generative
from ..nn.attention import Segments
from ..nn.cache import Cache
from .draw import Canvas, Drawing
from .fitting import TooLong as TooLong  # callers catch it by this module's name
from .fitting import fitting
from .sample import Sampling, choose


@dataclass
class Reply:
    """What the model said. `finish` is "stop" (end token or stop text) or "length"; `segments` are its texts and pictures in order,
    `text` the texts alone, with a newline where pictures stand between them."""

    text: str
    ids: list[int]
    finish: str
    usage: dict[str, int]
    segments: list[tuple[str, Any]] = field(default_factory=list)
    note: str = ""
    """What the caller should know of the reply: that the model would have drawn, and had no decoder to draw with or no room."""

    @property
    def images(self) -> list[Image.Image]:
        return [value for kind, value in self.segments if kind == "image"]


@dataclass(frozen=True)
class Partial:
    """A picture under way; `done` is the share of its codes."""

    codes: tuple[int, ...]
    canvas: Canvas
    done: float

    @property
    def picture(self) -> Image.Image:
        """Its rows so far, the rest grey; decoded when it is asked for."""
        return self.canvas.partial(list(self.codes))


@dataclass
class _Run:
    """One conversation under way."""

    index: int
    prompt: TokenBatch
    generator: torch.Generator
    position: int
    """M-RoPE and plain alike: where the next token stands on every axis."""
    room: int
    """How many tokens the context has left for the reply."""
    dropped: int
    """Messages that were left out to make room."""
    said: list[int] = field(default_factory=list)
    text: str = ""
    """What has been said for certain in the text under way: whole characters, nothing that may turn out to be a stop text."""
    since: int = 0
    """Where in `said` the text under way begins."""
    decoded: str = ""
    """The text of `said[since:read]`."""
    prefix: int = 0
    read: int = 0
    """Tokens before `read` are decoded, those from `prefix` on are decoded again with new ones: what a token says may depend on the one
    before it."""
    words: int = 0
    """Tokens said outside pictures."""
    segments: list[tuple[str, Any]] = field(default_factory=list)
    drawing: Drawing | None = None
    finish: str | None = None
    note: str = ""

    def say(self, text: str) -> str:
        """`text` is now certain; returns what is new of it, after a newline where pictures stand between it and an earlier text."""
        new, begins = text[len(self.text) :], not self.text
        self.text = text
        return "\n" + new if new and begins and any(kind == "text" for kind, _ in self.segments) else new

    def close_text(self) -> None:
        if self.text:
            self.segments.append(("text", self.text))
        self.text = self.decoded = ""
        self.since = self.prefix = self.read = len(self.said)

    def reply(self) -> Reply:
        usage = {"prompt_tokens": len(self.prompt.ids), "completion_tokens": len(self.said)}
        usage |= {"dropped_messages": self.dropped} if self.dropped else {}
        text = "\n".join(value for kind, value in self.segments if kind == "text")
        return Reply(text, self.said, self.finish or "length", usage, self.segments, self.note)


Event = str | Partial | Reply


def replies(
    model: Generative, conversations: Sequence[Any], sampling: Sampling, *, slots: int = 16, progress: bool = False
) -> list[Reply]:
    """Replies to many conversations (lists of messages), in order.

    Raises:
        IntermodalError: a conversation cannot be replied to; `finished` gives such errors one by one instead.
    """
    out: list[Reply | None] = [None] * len(conversations)
    done = finished(model, conversations, sampling, slots=slots)
    for index, reply in track(done, "replying", total=len(conversations), disable=not progress, transient=True):
        if isinstance(reply, IntermodalError):
            raise reply if len(conversations) == 1 else type(reply)(f"conversation {index}: {reply}") from reply
        out[index] = reply
    return out  # pyright: ignore[reportReturnType]


def finished(
    model: Generative, conversations: Sequence[Any], sampling: Sampling, *, slots: int = 16
) -> Iterator[tuple[int, Reply | IntermodalError]]:
    """(index, reply) of many conversations as each is done, or why it cannot be begun. A conversation is asked for when its turn comes."""
    for index, event in _events(model, conversations, sampling, slots):
        if isinstance(event, Reply | IntermodalError):
            yield index, event


def stream(model: Generative, messages: Any, sampling: Sampling) -> Iterator[Event]:
    """Pieces of text as they become certain, pictures as they grow, then the whole `Reply`."""
    for _, event in _events(model, [messages], sampling, 1, partial=True):
        if isinstance(event, IntermodalError):
            raise event
        yield event


@torch.inference_mode()
def _events(
    model: Generative, conversations: Sequence[Any], sampling: Sampling, slots: int, partial: bool = False
) -> Iterator[tuple[int, Event | IntermodalError]]:
    sampling.check()
    if not isinstance(slots, int) or slots < 1:
        raise IntermodalError(f"slots={slots}: at least one conversation must be under way")
    processor = model.processor
    if processor is None:
        raise IntermodalError("this model came without a tokenizer: it cannot chat")
    slots = min(slots, len(conversations))
    if not slots:
        return
    ends = frozenset([*processor.end_ids, *_stop_tokens(processor, sampling.stop)])
    if model.vision_cache is None and processor.planner is not None:
        model.vision_cache = MemoryCache()
    if isinstance(model.vision_cache, MemoryCache):
        model.vision_cache.begin(model.tower_parameters())
    canvas = Canvas.of(model, sampling, ends)
    streams = canvas.streams if canvas else 1
    cache = model.model.cache(slots * streams)
    free, running, waiting = list(range(slots))[::-1], {}, list(range(len(conversations)))[::-1]
    compiled = DecodeStep.of(model)
    while waiting or running:
        arrivals: list[tuple[int, _Run]] = []
        while waiting and free:
            index = waiting.pop()
            try:
                run = _begun(index, conversations[index], model, processor, sampling, canvas.room if canvas else 0)
            except IntermodalError as error:
                yield index, error
            else:
                arrivals.append((free.pop(), run))
        if not arrivals and not running:
            break
        if arrivals:
            batch = TokenBatch.pack([run.prompt for _, run in arrivals])
            cache.begin([slot for slot, _ in arrivals], batch.segments)
            scores_NV = model.unembed(model.hidden(batch, cache)[batch.segments.offsets[1:] - 1])
            running.update(arrivals)
            step = arrivals
        else:
            step = sorted(running.items())
            if compiled is not None and not compiled.is_current():  # the model was moved while a stream was half heard
                compiled = DecodeStep.of(model)
            scores_NV = _feed(model, cache, step, slots, None if torch.is_autocast_enabled("cpu") else compiled)
        cache.commit()
        rows = iter(scores_NV)
        for slot, run in step:
            scores = [next(rows) for _ in range(run.drawing.streams if run.drawing else 1)]
            yield from ((run.index, event) for event in _advance(run, scores, processor, sampling, ends, canvas, partial))
            if run.drawing is None:
                for guide in range(1, streams):  # a picture is done: its guides are forgotten
                    cache.free(slot + guide * slots)
            if run.finish:
                del running[slot]
                cache.free(slot)
                free.append(slot)
                yield run.index, run.reply()


def _begun(index: int, messages: Any, model: Generative, processor: ChatProcessor, sampling: Sampling, picture: int) -> _Run:
    """A conversation ready to be read. Raises IntermodalError: it cannot be, or leaves no room for a reply."""
    context = model.config_text.context
    conversation, dropped = fitting(processor, messages, context, sampling, picture)
    prompt = processor.batch(conversation, cache=model.vision_cache).to(model.device)
    generator = torch.Generator().manual_seed(int(sampling.seed))
    # the last token's place, not the largest: by transformers' rule a long clip reaches past the words after it (PITFALLS D1)
    return _Run(index, prompt, generator, int(prompt.positions[..., -1].max()) + 1, context - len(prompt.ids), dropped)


def _feed(model: Generative, cache: Cache, step: Sequence[tuple[int, _Run]], slots: int, compiled: DecodeStep | None) -> Tensor:
    """Read the newest token of every conversation, and of every guide of a picture under way: (rows, V) scores, a conversation's own
    first. A guide's first step is its whole prompt."""
    ids: list[int] = []
    places: list[int] = []
    lengths: list[int] = []
    fed: list[int] = []
    for slot, run in step:
        ids.append(run.said[-1])
        places.append(run.position + len(run.said) - 1)
        lengths.append(1)
        fed.append(slot)
        for number, guide in enumerate(run.drawing.guides if run.drawing else (), 1):
            new = [*guide, *run.drawing.codes] if run.drawing else []
            known = cache.lengths[slot + number * slots]
            ids += new[known:]
            places += range(known, len(new))
            lengths.append(len(new) - known)
            fed.append(slot + number * slots)
    segments = Segments(lengths)
    cache.begin(fed, segments)
    positions = torch.tensor(places, device=model.device)
    embedded = model.model.embed_tokens(torch.tensor(ids, device=model.device))
    if compiled is not None and cache.single:
        return compiled(embedded, positions, cache)
    return model.unembed(model.model(embedded, segments, positions, cache=cache)[segments.offsets[1:] - 1])


def _advance(
    run: _Run,
    scores: list[Tensor],
    processor: ChatProcessor,
    sampling: Sampling,
    ends: frozenset[int],
    canvas: Canvas | None,
    partial: bool,
) -> Iterator[str | Partial]:
    """Choose the next token and take it into account; gives the text that has become certain and pictures that have grown."""
    if canvas is not None and run.drawing is not None:
        yield from _draw(run, scores, sampling, canvas, partial)
        return
    row = scores[0]
    if canvas is not None:
        room, pictures = run.room - len(run.said), _pictures(run)
        run.note = run.note or canvas.missed(row, room, pictures)
        row = canvas.text_scores(row, may_draw=room >= canvas.length and pictures < sampling.max_images)
    seen: Tensor | tuple[int, ...] = ()
    if sampling.repetition_penalty != 1:
        seen = torch.cat([run.prompt.ids, torch.tensor(run.said, dtype=torch.long, device=run.prompt.ids.device)])
    run.said.append(choose(row, seen, sampling, run.generator))
    if canvas is not None and run.said[-1] == canvas.tokens.begin and canvas.tokens.begin not in ends:
        delta = run.say(_decoded(run, run.said[:-1], processor, last=True))
        run.close_text()
        run.drawing = canvas.start(run.prompt.ids.tolist(), run.said)
        if delta:
            yield delta
        return
    run.words += 1
    delta = _certain(run, processor, sampling, ends)
    if run.finish:
        run.close_text()
    if delta:
        yield delta


def _pictures(run: _Run) -> int:
    return sum(kind == "image" for kind, _ in run.segments)


def _draw(run: _Run, scores: list[Tensor], sampling: Sampling, canvas: Canvas, partial: bool) -> Iterator[Partial]:
    drawing = run.drawing
    assert drawing is not None
    if len(drawing.codes) < canvas.count:
        token = canvas.choose(scores, run.generator)
        run.said.append(token)
        drawing.codes.append(token)
        if partial and len(drawing.codes) % canvas.side == 0:
            yield Partial(tuple(drawing.codes), canvas, len(drawing.codes) / canvas.count)
        return
    run.said.append(canvas.tokens.end)  # forced, not drawn
    run.segments.append(("image", canvas.picture(drawing.codes)))
    run.drawing = None
    run.close_text()
    if canvas.tokens.end in canvas.ends:
        run.finish = "stop"
    elif run.room <= len(run.said):
        run.finish = "length"


def _certain(run: _Run, processor: ChatProcessor, sampling: Sampling, ends: frozenset[int]) -> str:
    """Take the newest word token into account; returns the text that has become certain."""
    ended = run.said[-1] in ends
    said = run.said[:-1] if ended else run.said
    over = ended or run.words >= sampling.max_new_tokens or len(run.said) >= run.room
    text = _decoded(run, said, processor, last=over)
    cuts = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if cuts:
        text, over, ended = text[: min(cuts)], True, True
    elif not over:
        held = [length for stop in sampling.stop for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])]
        text = text[: len(text) - max(held, default=0)]
    if over:
        run.finish = "stop" if ended else "length"
    return run.say(text)


def _decoded(run: _Run, said: Sequence[int], processor: ChatProcessor, *, last: bool) -> str:
    """The text of `said[run.since:]`, without a character whose other bytes are still to come, unless nothing is. What was given once is
    never changed: some decoders (SentencePiece's byte fallback) take a character back when the bytes after it are broken."""
    before = processor.decode(said[run.prefix : run.read])
    new = processor.decode(said[run.prefix :])[len(before) :]
    if new and (last or not new.endswith("\ufffd")):
        run.decoded += new
        run.prefix, run.read = run.read, len(said)
    return run.decoded


def _stop_tokens(processor: ChatProcessor, stops: Sequence[str]) -> list[int]:
    """Stops that are tokens which texts leave out or spell as they are named. Any other token's name is not its text (of a byte-level
    vocabulary "é" is the byte 0xE9, which begins other letters too): those stops are found in the text."""
    if not stops:  # looking through the vocabulary takes longer than some steps
        return []
    tokenizer = processor.tokenizer
    named = marks_of(tokenizer) | set(tokenizer.get_added_tokens_decoder())
    if isinstance(processor.planner, CodePlanner):
        named |= all_marks(tokenizer, processor.planner)
    return [token for text in stops if (token := tokenizer.token_to_id(text)) in named]
