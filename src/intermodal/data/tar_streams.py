"""WebDataset shards that are not files of this machine: what a command prints, and addresses, read from front to back.

As in webdataset, `pipe:COMMAND` is given to the shell. `http(s)://` is read by Python itself, which asks for the rest where a connection
drops; every other address by `fsspec`, for which `s3://` needs the package s3fs and `gs://` gcsfs. A shard whose command fails, which
a server does not give or which is cut short gives the samples before that and one reject that names it, as a tar on disk does.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from tarfile import (
    EOFHeaderError,  # pyright: ignore[reportAttributeAccessIssue]  # typeshed leaves it out
    HeaderError,
    ReadError,
    TarError,
    TarInfo,
)
from typing import IO, Any
from urllib.parse import urlsplit

from ..errors import SampleError
from .hub import pair_of
from .patterns import braces, expand, joined
from .source import Sample, SourceError
from .stream import StreamSource
from .web import WebFile

PIPE = "pipe:"
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
TABLES = (".parquet", ".jsonl", ".csv", ".tsv")
PROBLEM = "__problem__"
"""In the place of a sample: why its shard ends here."""
PATIENCE = 60
"""Seconds after which a command that has closed its output counts as one that does not end."""
AFTER = 1 << 18
"""Bytes that are read after a tar's end mark: its padding. A command whose output is closed before that would fail."""
END_OF_PIPE = (0, -signal.SIGPIPE, 128 + signal.SIGPIPE)
"""Statuses of a command that did its work: we stop to read at the end of a tar, whatever it still prints."""


def is_streamed(spec: str) -> bool:
    """Whether a source's name is of shards that can only be read from front to back."""
    return any(part.startswith(PIPE) or ADDRESS.match(part) for part in spec.split("::"))


def open_shards(
    spec: str, *, seed: int, classes: Sequence[str] | None = None, to_talk: Callable[[str, Sample], Any] | None = None
) -> StreamSource:
    """`pipe:COMMAND` and addresses of tars, with braces expanded, several joined by `::`; among them may be files of this machine.

    Nothing is fetched before the first sample is asked for.

    Args:
        classes: what a `.cls` means, by its number.
        to_talk: makes something else of each sample and its key (a conversation).

    Raises:
        SourceError: an address of a table, of a kind that `fsspec` does not know, or for which a package is missing.
    """
    import datasets

    shards = [shard for part in joined(spec) for shard in _shards(part)]
    stream = datasets.IterableDataset.from_generator(samples_of, gen_kwargs={"shards": shards})
    first, last = _short(shards[0]), _short(shards[-1])
    name = first if len(shards) == 1 else f"{first}..{last}"
    return StreamSource(name, stream, partial(_tar_pair, classes, to_talk), seed=seed)


def _shards(pattern: str) -> list[str]:
    if not is_streamed(pattern):
        return [str(file) for file in expand(pattern)]
    if ADDRESS.match(pattern):
        _check(pattern)
    return braces(pattern)


def _check(address: str) -> None:
    """Refuse now what cannot be read later. Raises SourceError."""
    import fsspec

    scheme = address.partition("://")[0].lower()
    if urlsplit(address).path.lower().endswith(TABLES):
        raise SourceError(
            f"{address}: of addresses only tar shards are streamed; download the table, or stream it from the hub (hf:)"
        )
    if scheme in ("http", "https"):
        return
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(scheme)
        what = f"the package {package} (pip install {package})" if package else "a package that is not installed"
        raise SourceError(f"{address}: {scheme}:// needs {what}: {error}") from error
    except ValueError as error:
        raise SourceError(
            f"{address}: {error}; read are pipe:COMMAND, http(s)://, s3://, gs:// and what else fsspec knows"
        ) from error


def _short(shard: str) -> str:
    """A shard's name in messages: of an address the last part, without what may be a key to it."""
    return shard if shard.startswith(PIPE) else PurePosixPath(urlsplit(shard).path if ADDRESS.match(shard) else shard).name


def samples_of(shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each sample `__key__` and the bytes of its members by their endings; for each shard that fails `PROBLEM` with the reason.

    Members of a sample follow each other, as webdataset writes and reads them.
    """
    for shard in shards:
        record: dict[str, Any] = {}
        count, problem = 0, None
        try:
            for name, data in _members(shard):
                folder, _, base = name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{_short(shard)}/{folder}/{stem}" if folder else f"{_short(shard)}/{stem}"
                if record and record["__key__"] != key:
                    count += 1
                    yield record
                    record = {}
                record |= {"__key__": key, ending.lower(): data}
        except (TarError, EOFError) as error:
            problem = f"cut short or damaged after {{}} samples: {error}"
        except Exception as error:  # fsspec's file systems raise kinds of their own
            problem = f"cannot be read after {{}} samples: {error}"
        if record:
            count += 1
            yield record
        if problem is not None:
            yield {"__key__": _short(shard), PROBLEM: problem.replace("{}", str(count), 1)}


class _Header(TarInfo):
    """A header whose want is an error: `tarfile` takes the end of the data, and garbage after a member, for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:  # the end mark
            raise
        except HeaderError as error:
            raise ReadError(f"it ends without an end mark ({error})") from error


def _members(shard: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar, plain or compressed with gzip, bzip2 or xz. Raises what reading a shard can."""
    with (
        _opened(shard) as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header, encoding="utf-8") as archive,
    ):
        while (member := archive.next()) is not None:
            archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it would keep every header that it has read
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content.read()


def _opened(shard: str) -> contextlib.AbstractContextManager[Any]:
    if shard.startswith(PIPE):
        return _output_of(shard.removeprefix(PIPE))
    if shard.lower().startswith(("http://", "https://")):
        return WebFile(shard)
    if ADDRESS.match(shard):
        import fsspec

        return fsspec.open(shard, "rb")
    return open(shard, "rb")


@contextlib.contextmanager
def _output_of(command: str) -> Iterator[IO[bytes]]:
    """What a shell command prints.

    Raises:
        OSError: it ended with a status that is not 0; what it said last is told.
    """
    with tempfile.TemporaryFile() as said:
        # a session of its own: a Ctrl-C for the run, which goes on to save, would look like the end of the data
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=said, start_new_session=True)
        assert process.stdout is not None
        try:
            try:
                yield process.stdout
            except TarError as error:  # a command that failed is why its tar is cut short
                _finish(process, command, said, error)
                raise
            process.stdout.read(AFTER)
            _finish(process, command, said, None)
        finally:
            process.stdout.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _finish(process: subprocess.Popen[bytes], command: str, said: IO[bytes], error: Exception | None) -> None:
    """Wait for a command's end. Raises OSError: it failed, or does not end."""
    assert process.stdout is not None
    process.stdout.close()
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command!r} does not end") from error
    if status not in END_OF_PIPE:
        said.seek(0)
        words = said.read().decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"{command!r} ended with status {status}{f': {words[-1]}' if words else ''}") from error


def _tar_pair(classes: Sequence[str] | None, to_talk: Any, key: str, record: dict[str, Any]) -> Any:
    """A record of `samples_of` as a sample. Raises SampleError."""
    if PROBLEM in record:
        raise SampleError(record[PROBLEM])
    return pair_of({}, False, to_talk, key, record, classes=classes)
