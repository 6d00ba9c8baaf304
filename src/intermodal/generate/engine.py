"""Generation: conversations in, replies out; many at once, each with its own cache slot, sampler and stop rule.

A waiting conversation takes a slot as soon as one is free; prompts of new arrivals are read together, packed, and every step then
adds one token to all that are under way. Nothing about a reply depends on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track

from ..batch import TokenBatch
from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor, Conversation
from ..inputs.vision_cache import MemoryCache
from ..models.generative import Generative
from ..nn.attention import Segments
from .sample import Sampling, choose


class TooLong(IntermodalError):
    """A conversation does not fit the model's context."""


@dataclass
class Reply:
    """What the model said. `finish` is "stop" (end token or stop text) or "length"."""

    text: str
    ids: list[int]
    finish: str
    usage: dict[str, int]

    @property
    def images(self) -> list[Any]:
        return []

    @property
    def segments(self) -> list[tuple[str, Any]]:
        """Typed parts in order."""
        return [("text", self.text)]


@dataclass
class _Run:
    """One conversation under way."""

    index: int
    prompt: TokenBatch
    generator: torch.Generator
    position: int
    """M-RoPE and plain alike: where the next token stands on every axis."""
    most: int
    """Longest reply: what was asked for, or what the context has room for."""
    dropped: int
    """Messages that were left out to make room."""
    said: list[int] = field(default_factory=list)
    text: str = ""
    """What has been said for certain: whole characters, nothing that may turn out to be a stop text."""
    finish: str | None = None


def replies(
    model: Generative, conversations: Sequence[Any], sampling: Sampling, *, slots: int = 16, progress: bool = False
) -> list[Reply]:
    """Replies to many conversations (lists of messages), in order."""
    out: list[Reply | None] = [None] * len(conversations)
    done = (event for event in _events(model, conversations, sampling, slots) if isinstance(event[1], Reply))
    for index, reply in track(done, "replying", total=len(conversations), disable=not progress, transient=True):
        out[index] = reply  # pyright: ignore[reportArgumentType, reportCallIssue]
    return out  # pyright: ignore[reportReturnType]


def stream(model: Generative, messages: Any, sampling: Sampling) -> Iterator[str | Reply]:
    """Pieces of text as they become certain, then the whole `Reply`."""
    for _, event in _events(model, [messages], sampling, 1):
        yield event


@torch.inference_mode()
def _events(model: Generative, conversations: Sequence[Any], sampling: Sampling, slots: int) -> Iterator[tuple[int, str | Reply]]:
    sampling.check()
    processor = model.processor
    if processor is None:
        raise IntermodalError("this model came without a tokenizer: it cannot chat")
    slots = min(slots, len(conversations))
    if not slots:
        return
    if model.vision_cache is None and processor.planner is not None:
        model.vision_cache = MemoryCache()
    pictures = model.vision_cache
    if isinstance(pictures, MemoryCache):
        pictures.begin(model.tower_parameters())
    cache = model.model.cache(slots)
    free, running, waiting = list(range(slots))[::-1], {}, list(range(len(conversations)))[::-1]
    while waiting or running:
        arrivals: list[tuple[int, _Run]] = []
        while waiting and free:
            index = waiting.pop()
            conversation, dropped = fitting(processor, conversations[index], model.config_text.context, sampling)
            prompt = processor.batch(conversation, cache=pictures).to(model.device)
            most = min(sampling.max_new_tokens, model.config_text.context - len(prompt.ids))
            generator = torch.Generator().manual_seed(sampling.seed)
            run = _Run(index, prompt, generator, int(prompt.positions.max()) + 1, most, dropped)
            arrivals.append((free.pop(), run))
        if arrivals:
            batch = TokenBatch.pack([run.prompt for _, run in arrivals])
            cache.begin([slot for slot, _ in arrivals], batch.segments)
            hidden = model.hidden(batch, cache)[batch.segments.offsets[1:] - 1]
            running.update(arrivals)
            step = arrivals
        else:
            step = sorted(running.items())
            ids = torch.tensor([run.said[-1] for _, run in step], device=model.device)
            positions = torch.tensor([run.position + len(run.said) - 1 for _, run in step], device=model.device)
            segments = Segments([1] * len(step))
            cache.begin([slot for slot, _ in step], segments)
            hidden = model.model(model.model.embed_tokens(ids), segments, positions, cache=cache)
        cache.commit()
        scores = model.unembed(hidden)
        for (slot, run), row in zip(step, scores, strict=True):
            seen = torch.cat([run.prompt.ids, torch.tensor(run.said, dtype=torch.long, device=run.prompt.ids.device)])
            run.said.append(choose(row, seen, sampling, run.generator))
            delta = _advance(run, processor, sampling)
            if delta:
                yield run.index, delta
            if run.finish:
                del running[slot]
                cache.free(slot)
                free.append(slot)
                usage = {"prompt_tokens": len(run.prompt.ids), "completion_tokens": len(run.said)}
                usage |= {"dropped_messages": run.dropped} if run.dropped else {}
                yield run.index, Reply(run.text, run.said, run.finish, usage)


def _advance(run: _Run, processor: ChatProcessor, sampling: Sampling) -> str:
    """Take the newest token into account; returns the text that has become certain."""
    ended = run.said[-1] in processor.end_ids
    text = processor.decode(run.said[:-1] if ended else run.said)
    over = ended or len(run.said) >= run.most
    cuts = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
    if cuts:
        text, over, ended = text[: min(cuts)], True, True
    elif not over:
        text = text.rstrip("\ufffd")  # half a character: its other bytes are in the next token
        held = [length for stop in sampling.stop for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])]
        text = text[: len(text) - max(held, default=0)]
    if over:
        run.finish = "stop" if ended else "length"
    elif not text.startswith(run.text):  # a tokenizer may still change the last piece (a space before a word)
        return ""
    delta, run.text = text[len(run.text) :], text
    return delta


def fitting(
    processor: ChatProcessor, messages: Sequence[dict[str, Any]], context: int, sampling: Sampling
) -> tuple[Conversation, int]:
    """The conversation as tokens, and how many of its messages were left out by `Sampling.too_long`.

    Raises:
        TooLong: it leaves no room for a reply; with the count of each item.
    """
    conversation, dropped = processor.conversation(messages, reply=True), 0
    if sampling.too_long == "drop_oldest":
        room = context - min(sampling.max_new_tokens, context // 2)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = [at for at, message in enumerate(messages) if message["role"] == "user"]
        for start in turns[1:]:
            if len(conversation.ids) <= room:
                break
            conversation, dropped = processor.conversation([*system, *messages[start:]], reply=True), start - len(system)
    check_length(conversation, context, sampling.max_new_tokens)
    return conversation, dropped


def check_length(conversation: Conversation, context: int, new: int) -> None:
    """Raises TooLong, with the count of each item, when a prompt leaves no room in the context for a reply."""
    total = len(conversation.ids)
    if total < context:
        return
    media = [f"{plan.kind} {number}: {len(plan)}" for number, plan in enumerate(conversation.plans, 1)]
    text = total - sum(len(plan) for plan in conversation.plans)
    parts = ", ".join([f"text: {text}", *media])
    raise TooLong(
        f"the conversation has {total} tokens ({parts}), the model's context {context}, and a reply of up to {new} must fit too; "
        'leave out turns or media, make pictures smaller, or set too_long="drop_oldest" to leave out the oldest turns'
    )
