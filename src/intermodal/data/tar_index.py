"""Where the samples of a tar shard are: found by reading its headers once, held in a few arrays, and kept for the next start.

An index is kept in the user's cache folder and not beside its shard: data folders are often shared or read-only, and whoever reads such a
folder as a whole (`datasets`, a glob, a copy to another machine) would take a file beside the shards for data.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tarfile
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ..files import cache_folder

FORMAT = 1
"""Of kept indexes. Raise it when what is in them changes: those of another format are made anew."""
LEAST_KEPT = 256
"""Samples of a shard whose index is kept: fewer are found about as soon in the shard itself."""
THREADS = 8
"""Shards that are scanned at a time. A header is a wait for the disk or the network; of what is in memory one thread finds as much."""
BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gzip: gunzip", b"\x28\xb5\x2f\xfd": "zstd: unzstd", b"\xfd7zXZ": "xz: unxz", b"BZh": "bzip2: bunzip2"}


@dataclass(frozen=True)
class Words:
    """Texts end to end, for a Python string takes 49 bytes before its first letter.

    `text` (bytes,) is their UTF-8, `ends` (N,) where in it each ends.
    """

    text: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, words: Iterable[str]) -> Words:
        encoded = [word.encode("utf-8", "surrogateescape") for word in words]
        return cls(
            np.frombuffer(b"".join(encoded), np.uint8), _smallest(np.cumsum([len(word) for word in encoded], dtype=np.int64))
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        return self.text[_part(self.ends, number)].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class ShardIndex:
    """The N samples of a shard and their M members, in the order in which they begin in it.

    `member_ends` (N,) says before which member a sample ends; `suffix` (M,) is a member's ending by its number in `suffixes`, `offset`
    (M,) and `size` (M,) where its bytes are in the file. The arrays are of the smallest types that hold them.
    """

    keys: Words
    suffixes: Words
    member_ends: np.ndarray
    suffix: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    problem: str | None = None
    """Why the shard could not be read, or not to its end."""

    def __len__(self) -> int:
        return len(self.keys)

    def parts(self, number: int) -> dict[str, tuple[int, int]]:
        """Where the members of a sample are: (offset, size) by ending, of equal endings the last."""
        part = _part(self.member_ends, number)
        members = zip(self.suffix[part].tolist(), self.offset[part].tolist(), self.size[part].tolist(), strict=True)
        return {self.suffixes[suffix]: (offset, size) for suffix, offset, size in members}

    def arrays(self) -> dict[str, np.ndarray]:
        """All that is kept of it."""
        found = {name: getattr(self, name) for name in ("member_ends", "suffix", "offset", "size")}
        for name in ("keys", "suffixes"):
            words: Words = getattr(self, name)
            found |= {f"{name}_text": words.text, f"{name}_ends": words.ends}
        return found


def _part(ends: np.ndarray, number: int) -> slice:
    return slice(int(ends[number - 1]) if number else 0, int(ends[number]))


def _smallest(values: np.ndarray) -> np.ndarray:
    return values.astype(np.min_scalar_type(values.max(initial=0)))


def shard_indexes(files: Sequence[Path]) -> list[ShardIndex]:
    """The index of each file, as it was kept or from its headers.

    Processes of one machine begin each at another shard and keep what they find, so that together they scan a shard about once.
    """
    if len(files) == 1:  # in this thread, where Ctrl-C stops it
        return [shard_index(files[0])]
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    first = len(files) * rank // ranks
    order = [*range(first, len(files)), *range(first)]
    pool = ThreadPoolExecutor(THREADS)
    try:
        indexes = dict(zip(order, _shown(pool.map(lambda number: shard_index(files[number]), order), len(files)), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    return [indexes[number] for number in range(len(files))]


def _shown(indexes: Iterator[ShardIndex], total: int) -> Iterator[ShardIndex]:
    """The same; on a terminal with a bar once they have taken two seconds."""
    begun = time.monotonic()
    for done, index in enumerate(indexes, 1):
        yield index
        if time.monotonic() - begun > 2:
            quiet = os.environ.get("RANK", "0") != "0"  # of the processes of a torchrun the first shows it
            console = Console(stderr=True)
            yield from track(
                indexes, "scanning shards", console=console, transient=True, completed=done, total=total, disable=quiet
            )


def shard_index(file: Path) -> ShardIndex:
    """The index that was kept of the shard as it is now, or a new one, which is kept.

    Of a shard that is damaged none is: it may still be written, or the disk may have failed this once.
    """
    stamp, place = _stamp(file), _place(file)
    index = _kept(place, stamp)
    if index is None:
        index = scan(file)
        if index.problem is None and len(index) >= LEAST_KEPT and _stamp(file) == stamp:
            _keep(place, stamp, index)
    return index


def _stamp(file: Path) -> list[int] | None:
    """What is another when the shard is another."""
    try:
        found = file.stat()
    except OSError:  # the scan will say so
        return None
    return [FORMAT, found.st_size, found.st_mtime_ns]


def _place(file: Path) -> Path | None:
    try:
        path = os.fsencode(file.resolve())
        return cache_folder() / "tar-index" / f"{file.stem}-{hashlib.blake2b(path, digest_size=10).hexdigest()}.npz"
    except (OSError, RuntimeError):  # the latter: this user has no home folder
        return None


def _kept(place: Path | None, stamp: list[int] | None) -> ShardIndex | None:
    if place is None or stamp is None:
        return None
    try:
        with np.load(place) as kept:  # a zip file, which holds a checksum of each array
            if kept["stamp"].tolist() != stamp:
                return None
            keys, suffixes = (Words(kept[f"{name}_text"], kept[f"{name}_ends"]) for name in ("keys", "suffixes"))
            return ShardIndex(keys, suffixes, *(kept[name] for name in ("member_ends", "suffix", "offset", "size")))
    except Exception:  # it is not there, or damaged, for which zipfile, zlib and numpy raise a dozen kinds
        return None


def _keep(place: Path | None, stamp: list[int] | None, index: ShardIndex) -> None:
    """Under another name and then moved into place: several processes may write it. Where nothing can be written nothing is."""
    if place is None:
        return
    part = place.with_name(f"{place.name}.{secrets.token_hex(6)}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                np.savez(file, allow_pickle=False, stamp=np.array(stamp, np.int64), **index.arrays())
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)
    except OSError:
        return


def scan(file: Path) -> ShardIndex:
    """The index of a shard from its headers; of one that is damaged, of the members before that."""
    keys: dict[str, int] = {}
    suffixes: dict[str, int] = {}
    of, suffix, offset, size = (array("q") for _ in range(4))
    problem = None
    try:
        for name, begin, length in _members(file):
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            of.append(keys.setdefault(f"{folder}/{stem}" if folder else stem, len(keys)))
            suffix.append(suffixes.setdefault(ending.lower(), len(suffixes)))
            offset.append(begin)
            size.append(length)
    except (tarfile.TarError, EOFError) as error:
        problem = (not keys and _compressed(file)) or f"cut short or damaged after {len(keys)} samples: {error}"
    except OSError as error:
        problem = f"cannot be read after {len(keys)} samples: {error}"
    sample = np.array(of, np.int64)
    order = np.argsort(sample, kind="stable")  # members of a sample need not follow each other
    ends = np.cumsum(np.bincount(sample, minlength=len(keys)))
    by_sample = (_smallest(np.array(values, np.int64)[order]) for values in (suffix, offset, size))
    return ShardIndex(Words.of(keys), Words.of(suffixes), _smallest(ends), *by_sample, problem=problem)


def _members(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in a tar.

    Raises:
        tarfile.TarError: it is no tar, or one that is cut short or damaged, after the members before that.
    """
    with tarfile.open(file, "r:", encoding="utf-8") as archive:
        opened, end, at = archive.fileobj, file.stat().st_size, 0
        assert opened is not None
        while True:
            opened.seek(at)
            header = opened.read(BLOCK)
            if header == bytes(BLOCK):
                return
            found = None if archive.pax_headers else _plain(header)  # pax headers of the whole archive may say otherwise
            if found is not None:
                name, size = found
                offset, is_file = at + BLOCK, True
                at = offset + -(-size // BLOCK) * BLOCK
            else:
                archive.offset = at
                opened.seek(at)
                try:
                    member = tarfile.TarInfo.fromtarfile(archive)
                except tarfile.HeaderError as error:
                    raise tarfile.ReadError(f"it ends without an end mark ({error})") from error
                name, size, offset, is_file = member.name, member.size, member.offset_data, member.isfile()
                at = archive.offset
            if not is_file:
                continue
            if offset + size > end:
                raise tarfile.ReadError(f"{name} reaches past the end of the file")
            yield name, offset, size


def _plain(header: bytes) -> tuple[str, int] | None:
    """Name and size of a regular file whose header has nothing special: in a fifth of the time of `tarfile`. None: ask that."""
    special = (
        len(header) != BLOCK or header[156] not in b"0\0" or header[345] or header[124] >= 0x80
    )  # type, prefix, size in binary
    name = header[:100].partition(b"\0")[0]
    if special or name.endswith(b"/"):
        return None
    try:
        size, checksum = (int(field.partition(b"\0")[0].strip() or b"0", 8) for field in (header[124:136], header[148:156]))
    except ValueError:
        return None
    if size < 0 or sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:  # the checksum counts as spaces itself
        return None
    return name.decode("utf-8", "surrogateescape"), size


def _compressed(file: Path) -> str | None:
    """What to do about a file that is compressed although its name does not say so; None of any other."""
    with file.open("rb") as opened:
        start = opened.read(6)
    found = next((how for magic, how in COMPRESSED.items() if start.startswith(magic)), None)
    return found and f"no plain tar but compressed with {found} it first (a compressed shard has no random access)"
