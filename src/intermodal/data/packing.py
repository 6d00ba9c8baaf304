"""Conversations to packs: every step takes a fixed number of conversations and lays them end to end, longest first, into few packs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset

from ..batch import TokenBatch
from ..errors import IntermodalError
from ..inputs.chat import ChatProcessor, Conversation, NoSupervision
from ..inputs.codes import CodePlanner
from ..inputs.vision_cache import VisionCache
from ..nn.attention import Segments
from .loader import ATTEMPTS, DataError, number_of
from .source import Reject
from .stream import StreamSource
from .talks import ALONE, Talk, TalkSource


def picture_alone(batch: TokenBatch, processor: ChatProcessor) -> TokenBatch:
    """A conversation from its first picture's begin token on, after the beginning of all text where the model has one: what
    `generate.draw` guides away from."""
    planner = processor.planner
    if not isinstance(planner, CodePlanner):
        return batch
    bos = processor.bos_id
    start = batch.ids.tolist().index(planner.image_tokens.begin)
    first = [] if bos is None else [bos]
    ids = torch.cat([torch.tensor(first, dtype=torch.long), batch.ids[start:]])
    supervised = torch.cat([torch.zeros(len(first), dtype=torch.bool), batch.supervised[start:]])
    return TokenBatch(ids, Segments([len(ids)]), torch.arange(len(ids)), supervised, keys=batch.keys)


@dataclass
class Packs:
    """One rank's part of a step: packs of at most the budget, and how many conversations they hold."""

    batches: list[TokenBatch]
    rejects: list[Reject] = field(default_factory=list)

    @property
    def read(self) -> int:
        return sum(len(batch) for batch in self.batches)


@dataclass
class Found:
    """A conversation that can be trained on, its pictures' tokens not yet made."""

    conversation: Conversation
    batch: TokenBatch
    alone: bool
    """Only its first picture is learned."""


def bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in bins of at most `budget` tokens each: first fit, longest first.

    Raises:
        ValueError: one length alone is over the budget.
    """
    out: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > budget:
            raise ValueError(f"{lengths[index]} tokens do not fit into {budget}")
        place = next((at for at, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            out.append([])
            room.append(budget)
            place = len(out) - 1
        out[place].append(index)
        room[place] -= lengths[index]
    return out


class TalkFetcher(Dataset):
    """References to packs; runs in the workers. A conversation that cannot be used is replaced as `loader.Fetcher` does."""

    def __init__(
        self,
        sources: Sequence[TalkSource | StreamSource],
        processor: ChatProcessor,
        seed: int,
        budget: int,
        longest: int,
        cache: VisionCache | None = None,
    ):
        self.sources, self.processor, self.seed = list(sources), processor, seed
        self.budget, self.longest, self.cache = budget, min(longest, budget), cache

    def __getitem__(self, references: tuple[int, list[tuple[int, int | Talk]]]) -> Packs:
        _, wanted = references
        rejects: list[Reject] = []
        found = [one for which, at in wanted if (one := self._usable(which, at, rejects)) is not None]
        singles = self._finished(found)
        packed = bins([len(single.ids) for single in singles], self.budget)
        return Packs([TokenBatch.pack([singles[i] for i in sorted(chosen)]) for chosen in packed], rejects)

    def read(self, which: int, index: int) -> TokenBatch:
        """Conversation `index` of a source as a batch of one, its loss mask audited.

        Raises:
            IntermodalError: it cannot be used, and why.
        """
        return self._finished([self._read(which, index)])[0]

    def _read(self, which: int, index: int) -> Found:
        source = self.sources[which]
        assert not isinstance(source, StreamSource)
        return self._prepared(source[index])

    def _prepared(self, talk: Talk) -> Found:
        conversation = self.processor.conversation(talk.messages)
        self.processor.audit(conversation)
        if len(conversation.ids) > self.longest:
            raise NoSupervision(f"{len(conversation.ids)} tokens, more than the {self.longest} that fit (data.tokens, the context)")
        batch = self.processor.batch(conversation, talk.key, self.cache, codes=False)
        return Found(conversation, batch, bool(talk.meta.get(ALONE)))

    def _finished(self, found: Sequence[Found]) -> list[TokenBatch]:
        """The batches with their pictures' tokens, which a VQ-VAE makes faster for many pictures than one by one."""
        self.processor.write_codes([one.conversation for one in found], [one.batch for one in found])
        return [picture_alone(one.batch, self.processor) if one.alone else one.batch for one in found]

    def _usable(self, which: int, at: int | Talk, rejects: list[Reject]) -> Found | None:
        """The conversation asked for, or the first usable one of a sequence that its number determines. One of a stream has no other to
        take its place: the step is then smaller by it."""
        source = self.sources[which]
        if isinstance(at, Talk):
            try:
                return self._prepared(at)
            except IntermodalError as error:
                rejects.append(Reject(at.key, str(error)))
                return None
        assert not isinstance(source, StreamSource)
        index = at
        for attempt in range(ATTEMPTS):
            try:
                return self._read(which, index)
            except IntermodalError as error:
                rejects.append(Reject(f"{source.name}/{index}", str(error)))
                index = number_of(f"{source.name}/{at}/{attempt}") % len(source)
        last = rejects[-1]
        raise DataError(f"{ATTEMPTS} conversations of {source.name} in a row were unusable; the last: {last.key}: {last.reason}")

    def audit(self, allowed: float = 0.0, looks: int = 8) -> None:
        """Look at a few conversations of each source before a run starts. A single bad one is a reject, when its turn comes.

        Args:
            allowed: the share of bad ones that a run takes, `data.max_reject_share`.

        Raises:
            DataError: a source is empty, or more than half of them, and than are allowed, cannot be trained on; with the last's reason.
        """
        for which, source in enumerate(self.sources):
            if not isinstance(source, StreamSource) and not len(source):
                raise DataError(f"{source.name} holds no conversations")
            rng = random.Random(f"{self.seed}/audit/{which}")
            reasons = []
            numbers = range(looks) if isinstance(source, StreamSource) else {rng.randrange(len(source)) for _ in range(looks)}
            for index in numbers:
                try:
                    found = self._prepared(source.next()) if isinstance(source, StreamSource) else self._read(which, index)
                    self._finished([found])
                except IntermodalError as error:
                    reasons.append(f"{source.name}/{index}: {error}")
            if len(reasons) > max(0.5, allowed) * len(numbers):
                raise DataError(
                    f"{len(reasons)} of {len(numbers)} conversations of {source.name} cannot be trained on; the last: {reasons[-1]}; "
                    f"where that is meant, data.max_reject_share lets more of them pass"
                )
