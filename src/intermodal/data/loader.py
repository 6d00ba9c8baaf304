"""Samples to packed batches: mixing, shuffling, sharding over ranks and workers, rejects, exact resume.

The order of samples is a pure function of the seed and a position, so a state is a few integers. Every rank walks the same global
order and takes its slice of each batch: the same run on another number of ranks sees the same batches. A sample that cannot be
used is replaced by another of its source, chosen by its own number alone, and named in `rejects.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..batch import PairBatch
from ..errors import IntermodalError, SampleError
from ..inputs.image import ImageProcessor, NaflexProcessor, open_image
from ..inputs.processor import PairProcessor
from .source import Apart, Reject, Sample, Source
from .stream import StreamSource

ENDLESS = 1 << 32
"""Sources at least this long are read in order: they are generated, there is nothing to shuffle."""
ATTEMPTS = 50


class DataError(IntermodalError):
    """The data cannot feed a run: nothing readable, or too many rejects."""


class Rejects:
    """Counts one rank's unusable samples and names each once in a file. A file that is there (of a run that goes on) is added to."""

    def __init__(self, path: Path | None, max_share: float):
        self.path, self.max_share = path, max_share
        self.read, self.rejected = 0, 0
        self.last: Reject | None = None
        self.seen: set[str] = set()
        if path is not None and path.exists():
            # a line without its end is of a process that died while it wrote
            named = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(named))
            self.seen = {json.loads(line)["key"] for line in named}

    def note(self, key: str, reason: str) -> None:
        """Name something unusable that is not a sample (a shard that is cut short)."""
        if key not in self.seen and self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "reason": reason}) + "\n")
        self.seen.add(key)

    def add(self, read: int, rejects: Sequence[Reject]) -> None:
        """Count `read` usable samples and those that are not."""
        self.read += read + len(rejects)
        self.rejected += len(rejects)
        for reject in rejects:
            self.note(reject.key, reject.reason)
            self.last = reject

    def over(self, read: int, rejected: int) -> bool:
        """Whether too many of the samples read were unusable; not judged before the first hundred."""
        return read >= 100 and rejected > self.max_share * read

    def too_many(self, read: int, rejected: int, last: Reject | None, where: Path | None) -> DataError:
        """The error that says so, naming one of them and the file that names all."""
        return DataError(
            f"{rejected} of {read} samples were unusable, more than data.max_reject_share={self.max_share}"
            + (f"; the last: {last.key}: {last.reason}" if last else "")
            + (f"; all are in {where}" if where else "")
        )


class Mixture:
    """A global order over several sources: an iterator of references with a state of a few integers.

    A map-style source is walked epoch by epoch in an order shuffled by (seed, source, epoch); a stream gives its next record. With
    several sources each position draws one by weight.
    """

    def __init__(self, sources: Sequence[Source | StreamSource], weights: Sequence[float] | None = None, seed: int = 0):
        if not sources:
            raise DataError("no data sources were given")
        if weights is not None and len(weights) != len(sources):
            raise DataError(f"{len(weights)} weights for {len(sources)} sources; give one each, or data.weights=null")
        if weights is None and len(sources) > 1 and any(isinstance(s, StreamSource) or len(s) >= ENDLESS for s in sources):
            raise DataError("data.weights is needed when one of several sources is endless or a stream")
        for source in sources:
            if not isinstance(source, StreamSource) and len(source) == 0:
                raise DataError(f"{source.name} holds no samples")
        self.sources, self.seed = list(sources), seed
        self.weights = list(weights) if weights else [float(len(s)) if isinstance(s, Source) else 1.0 for s in sources]
        self.position = 0
        self.counters = [0] * len(sources)
        self._orders: dict[int, tuple[int, torch.Tensor]] = {}

    def next(self, mine: bool = True) -> tuple[int, int | Sample] | None:
        """The next reference of the global order, or None where it is in another rank's part of a stream."""
        which = self._choose()
        source, count = self.sources[which], self.counters[which]
        self.position += 1
        if isinstance(source, StreamSource):
            if not mine and source.part[1] > 1:
                return None
            self.counters[which] += 1
            return which, source.next()
        self.counters[which] += 1
        return which, self._index(which, count)

    def state(self) -> dict[str, Any]:
        streams = [s.state() if isinstance(s, StreamSource) else None for s in self.sources]
        place = {"seed": self.seed, "position": self.position, "counters": list(self.counters), "streams": streams}
        return {**place, "sources": self._described()}

    def _described(self) -> list[str]:
        """Each source by name and size: in others the same numbers would be other samples."""
        return [s.name if isinstance(s, StreamSource) else f"{s.name} ({len(s)} samples)" for s in self.sources]

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state belongs to other sources or another seed."""
        before, now = state.get("sources", self._described()), self._described()
        if state["seed"] != self.seed or before != now:
            what = f"seed {state['seed']} and {', '.join(before)}; now they are {self.seed} and {', '.join(now)}"
            raise DataError(
                f"the checkpoint's place in the data is of {what}. Resume with the same data, or begin a new run from the trained "
                "weights (model.start=DIR)"
            )
        self.position, self.counters = state["position"], list(state["counters"])
        for source, kept in zip(self.sources, state["streams"], strict=True):
            if isinstance(source, StreamSource):
                source.restore(kept)

    def _choose(self) -> int:
        if len(self.sources) == 1:
            return 0
        draw = random.Random(f"{self.seed}/mix/{self.position}").random() * sum(self.weights)
        for which, weight in enumerate(self.weights):
            draw -= weight
            if draw < 0:
                return which
        return len(self.weights) - 1

    def _index(self, which: int, count: int) -> int:
        source = self.sources[which]
        assert not isinstance(source, StreamSource)
        length = len(source)
        if length >= ENDLESS:
            return count
        epoch, at = divmod(count, length)
        if self._orders.get(which, (-1, None))[0] != epoch:
            generator = torch.Generator().manual_seed(number_of(f"{self.seed}/{which}/{epoch}"))
            self._orders[which] = (epoch, torch.randperm(length, generator=generator))
        return int(self._orders[which][1][at])


def number_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass
class Fetched:
    """One batch as it comes out of a worker."""

    batch: PairBatch
    rejects: list[Reject] = field(default_factory=list)

    @property
    def read(self) -> int:
        return len(self.batch)


class PictureFetcher(Dataset):
    """Usable pictures of references, cropped at random and resized; runs in the workers."""

    captioned = True
    """Whether a picture without a caption is a reject."""

    def __init__(
        self, sources, pictures: ImageProcessor | NaflexProcessor, seed: int, crop_scale: tuple[float, float] | None = None
    ):
        self.sources, self.pictures, self.seed, self.crop_scale = sources, pictures, seed, crop_scale

    def _usable(self, which: int, at: int | Sample, rng: random.Random, rejects: list[Reject]):
        """The sample asked for, or the first usable one of a sequence that its number determines."""
        if isinstance(at, Sample):
            return at, self._picture(at, rng)
        source, index = self.sources[which], at
        for attempt in range(ATTEMPTS):
            try:
                sample = self._sample(source, index)
                return sample, self._picture(sample, rng)
            except SampleError as error:
                rejects.append(Reject(f"{source.name}/{index}", str(error)))
                index = number_of(f"{source.name}/{at}/{attempt}") % len(source)
        raise DataError(
            f"{ATTEMPTS} samples of {source.name} in a row were unusable; the last: {rejects[-1].key}: {rejects[-1].reason}"
        )

    def _sample(self, source: Source, index: int) -> Sample:
        if not self.captioned and isinstance(source, Apart):
            key, picture = source.picture_at(index)
            return Sample(key, picture, [])
        sample = source[index]
        if self.captioned and not any(text.strip() for text in sample.texts):
            raise SampleError("no caption")
        return sample

    def _picture(self, sample: Sample, rng: random.Random):
        """The picture at the size that the model sees, as bytes: a batch of photos does not fit into memory as they are."""
        picture = open_image(sample.image)
        if self.crop_scale is not None:
            picture = random_crop(picture, self.crop_scale, rng)
        return self.pictures.resized(picture)


class Fetcher(PictureFetcher):
    """References to a packed batch of pairs. Its pixels are bytes, a quarter of the floats that the training process makes of them."""

    def __init__(self, sources, processor: PairProcessor, seed: int, crop_scale: tuple[float, float] | None = None):
        super().__init__(sources, processor.images, seed, crop_scale)
        self.processor = processor

    def __getitem__(self, references: tuple[int, list[tuple[int, int | Sample]]]) -> Fetched:
        start, wanted = references
        images, texts, keys, rejects = [], [], [], []
        for offset, (which, at) in enumerate(wanted):
            rng = random.Random(f"{self.seed}/pick/{start + offset}")
            sample, image = self._usable(which, at, rng, rejects)
            images.append(image)
            texts.append(rng.choice(sample.texts))
            keys.append(sample.key)
        groups = torch.tensor([number_of(text) for text in texts])
        return Fetched(PairBatch(self.pictures.levels(images), self.processor.texts(texts), keys, groups), rejects)


def random_crop(picture, scale: tuple[float, float], rng: random.Random):
    """A random part of the picture: a share of its area within `scale`, aspect changed by at most 4:3, as torchvision draws it; the whole
    where ten draws do not fit. What comes after is the model's own resize, which keeps the aspect where it cuts the middle out."""
    width, height = picture.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = (4 / 3) ** rng.uniform(-1, 1)
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            return picture.crop((x, y, x + w, y + h))
    return picture


def _outlive_a_signal(worker: int) -> None:
    """In a worker: Ctrl-C and SIGTERM often reach all processes of a run at once (a terminal, torchrun, a job scheduler). The first is for
    the one that trains, which saves and then ends its workers; the next one counts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@dataclass
class _Refused:
    """What a worker could not do. Raised there, it would come as the text of a traceback."""

    error: IntermodalError


class _Telling(Dataset):
    """A fetcher whose errors come back as they are."""

    def __init__(self, fetcher: Dataset):
        self.fetcher = fetcher

    def __getitem__(self, references: Any) -> Any:
        try:
            return self.fetcher[references]
        except IntermodalError as error:
            return _Refused(error)


class Loader:
    """Endless steps of data for one rank. `state()` is that of the last one handed out, whatever the workers have read ahead.

    The fetcher makes from references what has `read` (how many samples are in it) and `rejects`: `Fetched`, or `packing.Packs`.

    Iterating raises DataError past the limit of rejects where there is one rank; of several, the trainer adds up what they counted.
    """

    def __init__(
        self,
        mixture: Mixture,
        fetcher: Dataset,
        *,
        batch: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        rejects: Rejects | None = None,
    ):
        if batch % ranks:
            raise DataError(f"data.batch={batch} does not divide over {ranks} ranks; take a multiple")
        self.mixture, self.batch, self.rank, self.ranks, self.share = mixture, batch, rank, ranks, batch // ranks
        self.rejects = rejects or Rejects(None, 1.0)
        self.fetcher = fetcher
        self.workers, self.prefetch = workers, prefetch
        self._drawn: deque[tuple[dict[str, Any], list[Reject], int]] = deque()
        """What was drawn and not handed out yet: the state after it, what its streams skipped, and how many records of streams that
        every rank reads whole went to other ranks, where this rank counts for all."""
        self._state = mixture.state()

    def __iter__(self) -> Generator[Any, None, None]:
        self._drawn.clear()
        loader = DataLoader(
            _Telling(self.fetcher),
            batch_size=None,
            sampler=self._references(),  # pyright: ignore[reportArgumentType]
            num_workers=self.workers,
            generator=torch.Generator(),  # its own: the default one would draw from the random state that dropout resumes from
            prefetch_factor=self.prefetch if self.workers else None,
            worker_init_fn=_outlive_a_signal,
        )
        steps = iter(loader)
        try:
            for fetched in steps:
                if isinstance(fetched, _Refused):
                    raise fetched.error
                state, skipped, others = self._drawn.popleft()
                counted = self.rejects
                counted.add(fetched.read + others, fetched.rejects + skipped)
                if self.ranks == 1 and counted.over(counted.read, counted.rejected):
                    raise counted.too_many(counted.read, counted.rejected, counted.last, counted.path)
                self._state = state
                yield fetched
        finally:  # workers outlive the signal by which Python ends them at its own end, and would be waited for
            if self.workers:
                steps._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]

    def state(self) -> dict[str, Any]:
        return {**self._state, "rejects": [self.rejects.read, self.rejects.rejected]}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all ranks, which may have been another number: rank 0 then counts for those that are gone."""
        own = states[self.rank if len(states) == self.ranks else 0]
        self.mixture.restore(own)
        self._state = own
        counted = [own] if len(states) == self.ranks else list(states) if self.rank == 0 else []
        self.rejects.read, self.rejects.rejected = (sum(state["rejects"][i] for state in counted) for i in range(2))

    def _references(self):
        first, last = self.rank * self.share, (self.rank + 1) * self.share
        while True:
            start = self.mixture.position
            drawn = [self.mixture.next(first <= offset < last) for offset in range(self.batch)]
            streams = [source for source in self.mixture.sources if isinstance(source, StreamSource)]
            skipped = [(stream, reject) for stream in streams for reject in stream.take_rejects()]
            # what every rank reads whole is counted by one: its rejects, and among how many they were
            counts = {id(stream) for stream in streams if self.rank == 0 or stream.part[1] > 1}
            elsewhere = [one for offset, one in enumerate(drawn) if one is not None and not first <= offset < last]
            others = sum(id(self.mixture.sources[which]) in counts for which, _ in elsewhere)
            self._drawn.append((self.mixture.state(), [reject for stream, reject in skipped if id(stream) in counts], others))
            yield start + first, drawn[first:last]
