"""Sources that can only be read from front to back: hub data sets and remote shards, through `datasets`' streaming.

Records are tried as they are read, so that an unusable one is replaced by the next and nothing is skipped unseen. The order is
shuffled block by block; a state is the stream's own state at the start of a block and the place within it, so resuming reads the
block again and goes on exactly where it stopped (a plain shuffle buffer loses its content).

On several ranks each reads its own part: whole shards where their number divides, else every so many records (`datasets`' rule). With
`split_streams=False` every rank reads all of it.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from ..errors import IntermodalError, SampleError
from ..inputs.image import open_image
from .source import Reject, Sample, Source

AT_A_TIME, THREADS = 64, 8
"""Records that are read before they are decoded together, and on how many threads."""
UNDECODED = (UnicodeDecodeError, json.JSONDecodeError)
UNDECODABLE = (
    "datasets stops at a text that is not UTF-8 or a .json that is none; of tars it can be passed over: read them as files, or from "
    "their addresses (https://...tar), and it is one reject"
)


class StreamSource:
    """A `datasets.IterableDataset` with a function from a record's key and content to a sample or a conversation."""

    def __init__(self, name: str, dataset, to_sample: Callable[[str, dict[str, Any]], Any], *, seed: int = 0, block: int = 1024):
        self.name, self.dataset, self.to_sample = name, dataset, to_sample
        self.seed, self.block = seed, block
        self.rejects: list[tuple[int, Reject]] = []
        """Records that were skipped and not told of yet, with the pass they were skipped in."""
        self.part = (0, 1)
        """This rank, and among how many the stream is split."""
        self._whole, self._beginning = dataset, copy.deepcopy(dataset.state_dict())
        self._rewind(self._beginning)

    def split(self, rank: int, ranks: int) -> None:
        """Back to the beginning, and from now on only this rank's part of the records."""
        self._whole.set_epoch(0)  # whatever looked at it before may have come to another pass, and a state is of its pass
        self._whole.load_state_dict(copy.deepcopy(self._beginning))
        self.dataset, self.part = self._whole, (rank, ranks)
        beginning = self._beginning
        if ranks > 1:
            from datasets.distributed import split_dataset_by_node

            self.dataset = split_dataset_by_node(self._whole, rank, ranks)
            beginning = self.dataset.state_dict()
        self._rewind(beginning)

    def _rewind(self, beginning: dict[str, Any]) -> None:
        self.epoch = self.blocks = self.at = 0
        self.number = 0
        """Records of this pass that were read so far, unusable ones among them."""
        self._begin, self._block_state = (0, 0), copy.deepcopy(beginning)
        self._counted, self.rejects = False, []
        self._samples: list[Any] | None = None
        self._iterator: Iterator[dict[str, Any]] | None = None

    def next(self) -> Any:
        """The next usable sample; starts over at the end of the data.

        Raises:
            SampleError: a whole pass gave nothing usable.
        """
        while self._samples is None or self.at >= len(self._samples):
            if self._samples is not None:
                self.blocks += 1
                self.at = 0
            self._fill()
        self.at += 1
        return self._samples[self.at - 1]

    def state(self) -> dict[str, Any]:
        epoch, number = self._begin
        place = {"epoch": epoch, "number": number, "blocks": self.blocks, "at": self.at, "ranks": self.part[1]}
        return {**place, "filled": self._samples is not None or self._counted, "stream": self._block_state}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises IntermodalError: the state was kept on another number of ranks, whose parts were others."""
        if state["ranks"] != self.part[1]:
            raise IntermodalError(
                f"{self.name} is a stream and was read by {state['ranks']} ranks, now there are {self.part[1]}: each has read another "
                f"part. Resume on {state['ranks']} ranks, or start a new run from the trained model; with data.split_streams=false "
                f"it can go on on any number"
            )
        self.epoch, self.number, self.blocks, self.at = state["epoch"], state["number"], state["blocks"], state["at"]
        self._begin, self._block_state = (state["epoch"], state["number"]), state["stream"]
        self._counted, self.rejects = state["filled"], []
        self.dataset.set_epoch(self.epoch)
        self.dataset.load_state_dict(copy.deepcopy(state["stream"]))
        self._iterator = self._samples = None

    def take_rejects(self) -> list[Reject]:
        """The records skipped since the last call."""
        taken, self.rejects = [reject for _, reject in self.rejects], []
        return taken

    def _fill(self) -> None:
        self._begin = (self.epoch, self.number)
        if self._iterator is not None:  # else it is known: a data set tells of a state that it was given only once it is read
            self._block_state = copy.deepcopy(self.dataset.state_dict())
        empty_passes, samples = 0, []
        if self._iterator is None:
            self._iterator = iter(self.dataset)
        while len(samples) < self.block:
            # never more than the block still takes: its state is the data set's, which is behind the last record that was read
            records = self._records(self._iterator, min(AT_A_TIME, self.block - len(samples)))
            if not records:
                if samples:
                    break
                empty_passes += 1
                if empty_passes > 1:
                    why = f"; the last reason: {self.rejects[-1][1].reason}" if self.rejects else ""
                    raise SampleError(f"{self.name}: a whole pass over the stream gave no usable sample{why}")
                self.epoch += 1
                self.number = 0
                self._restart()
                continue
            keys = [self._key(number, record) for number, record in enumerate(records, self.number)]
            self.number += len(records)
            for key, made in zip(keys, self._made(keys, records), strict=True):
                if not isinstance(made, SampleError):
                    samples.append(made)
                elif not self._counted:  # a block that is read again after a resume has told of its own
                    self.rejects.append((self.epoch, Reject(f"{self.name}/{key}", str(made))))
        self._counted = False
        random.Random(f"{self.seed}/{self.epoch}/{self.blocks}").shuffle(samples)
        self._samples = samples

    def _records(self, iterator: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        try:
            return list(islice(iterator, count))
        except UNDECODED as error:  # within `datasets`, which cannot go on after it
            raise IntermodalError(
                f"{self.name}: after record {self.number} of pass {self.epoch}: {error}; {UNDECODABLE}"
            ) from error

    def _key(self, number: int, record: dict[str, Any]) -> str:
        part = f"{self.part[0]}." if self.part[1] > 1 else ""
        # the number too: shards may repeat each other's keys
        return ":".join([f"{part}{number}", *([str(record["__key__"])] if "__key__" in record else [])])

    def _made(self, keys: list[str], records: list[dict[str, Any]]) -> list[Any]:
        """What each record becomes, or why it cannot be used; on several threads, as decoding and fetching let go of Python's lock."""

        def make(key: str, record: dict[str, Any]) -> Any:
            try:
                return self.to_sample(f"{self.name}/{self.epoch}/{key}", record)
            except SampleError as error:
                return error

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(make, keys, records))

    def _restart(self) -> None:
        self.dataset.set_epoch(self.epoch)
        self._iterator = iter(self.dataset)


def first_samples(source: Source | StreamSource, count: int | None) -> Iterator[Sample | Reject]:
    """The first `count` samples with their pictures decoded, or what is wrong with each that cannot be used; of a stream at most one
    pass. None: all."""
    if not isinstance(source, StreamSource):
        for index in range(len(source) if count is None else min(count, len(source))):
            try:
                sample = source[index]
                sample.image = open_image(sample.image)
                yield sample
            except SampleError as error:
                yield Reject(f"{source.name}/{index}", str(error))
        return
    given = 0
    while count is None or given < count:
        sample = None
        try:
            sample = source.next()
        except SampleError as error:
            if not source.rejects:
                yield Reject(source.name, str(error))
        # the end shows only once a second pass has begun: its rejects were told of in the first
        rejects = [reject for epoch, reject in source.rejects if epoch == 0]
        source.take_rejects()
        yield from rejects
        if sample is None or source.epoch:
            return
        given += 1
        sample.image = open_image(sample.image)
        yield sample
