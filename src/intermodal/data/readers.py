"""Readers for what people have: WebDataset tar shards, parquet, JSONL, CSV, folders of pictures, hub data sets."""

from __future__ import annotations

import base64
import binascii
import csv
import glob
import http.client
import json
import os
import re
import tarfile
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..config import override
from ..errors import IntermodalError, SampleError, nearest
from ..inputs.image import open_image
from .source import NamedBytes, Sample, Source
from .stream import StreamSource

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "jpg", "png", "jpeg", "webp", "img", "filepath", "file_name", "image_path", "path", "url", "image_url")
TEXT_COLUMNS = ("caption", "captions", "text", "txt", "title", "texts", "label")
URL_TIMEOUT = 20
LONGEST_NAME = 100
LONGEST_FIELD = 1 << 30
"""Characters of a CSV field: a picture in base64 is far past the 131,072 that Python allows."""
OPEN_SHARDS = 64
"""Files that one tar source keeps open: a process may often have no more than 1,024, and a data set has thousands of shards."""
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][a-z0-9]+)*", re.IGNORECASE)
COMPRESSED = {b"\x1f\x8b": "gzip: gunzip", b"\x28\xb5\x2f\xfd": "zstd: unzstd", b"\xfd7zXZ": "xz: unxz", b"BZh": "bzip2: bunzip2"}
NAME_A_COLUMN = "name it with ?text=COLUMN"
TAR_CAPTIONS = f"a caption is a .txt (one a line) or a .json with one of {', '.join(TEXT_COLUMNS)}"


class SourceError(IntermodalError):
    """A source that cannot be opened at all."""


def open_source(spec: str, *, side: int = 64, seed: int = 0, allow_urls: bool = False) -> Source | StreamSource:
    """A source from its name on the command line.

    Args:
        spec: `scenes:core`, `scenes:all` (with settings of `SceneConfig` as `?pair_share=0.3&forms=3`), `sprites:core`,
            `sprites:all`, `signs` (printed words, with settings of `SignConfig`), `tuxpaint:<.deb or folder>` (with settings of
            `TuxPaintConfig`),
            `hf:<owner/name>[:split]`, or a path: a folder of pictures, or files ending in .tar, .parquet, .jsonl, .csv, with
            `{000..009}` and `*` expanded. `?image=COLUMN&text=COLUMN` after a table's path or a hub data set names its columns;
            folders and tars have none.
        side: pixels of a side for sources that draw their pictures.
        allow_urls: fetch pictures that a table names by http(s) address.

    Raises:
        SourceError: nothing there, nothing readable, or a setting that the source does not have.
    """
    from .drawn import SpriteConfig, SpriteSource
    from .scenes import SceneConfig, Scenes
    from .signs import SignConfig, Signs
    from .tuxpaint import TuxPaint, TuxPaintConfig

    kind, _, rest = spec.partition(":")
    if kind in ("scenes", "sprites"):
        rest, _, query = rest.partition("?")
        which = rest or "core"
        if which not in ("core", "all"):
            raise SourceError(f"{spec!r}: {kind} come as {kind}:core or {kind}:all{nearest(which, ('core', 'all'))}")
        settings = [assignment for assignment in query.split("&") if assignment]
        if kind == "sprites":
            return SpriteSource(override(SpriteConfig(side=side, concepts=which), settings))
        return Scenes(override(SceneConfig(side=side, concepts=which, seed=seed), settings))
    name, _, asked = spec.partition("?")
    settings = [assignment for assignment in asked.split("&") if assignment]
    if name == "signs":
        return Signs(override(SignConfig(side=side, seed=seed), settings))
    if name.partition(":")[0] == "tuxpaint":
        return TuxPaint(name.partition(":")[2], override(TuxPaintConfig(), settings))
    if kind == "hf":
        return open_pairs(rest, seed=seed, allow_urls=allow_urls)
    path, _, query = spec.partition("?")
    files = expand(path)
    if len(files) == 1 and files[0].is_dir():
        if query:
            raise SourceError(
                f"{path}: a folder has no columns, so ?{query} has no meaning; captions come from metadata.jsonl or metadata.csv, "
                f"from a .txt beside a picture, or from the names of folders"
            )
        return FolderSource(files[0])
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) != 1:
        raise SourceError(f"{path}: files of several kinds ({', '.join(sorted(suffixes))}); give one source a kind")
    suffix = suffixes.pop()
    if suffix == ".tar":
        if query:
            raise SourceError(f"{path}: a tar has no columns, so ?{query} has no meaning; {TAR_CAPTIONS}")
        return TarSource(files)
    columns = columns_of(query)
    if suffix == ".parquet":
        return ParquetSource(files, columns, allow_urls)
    if suffix in (".jsonl", ".csv", ".tsv"):
        return LinesSource(files, columns, allow_urls)
    if suffix in (".gz", ".zst", ".xz"):
        raise SourceError(
            f"{files[0]}: a compressed shard has no random access; unpack it to .tar first (pictures do not shrink anyway)"
        )
    raise SourceError(f"{files[0]}: unknown kind {suffix!r}; readable are a folder, .tar, .parquet, .jsonl, .csv, .tsv")


def columns_of(query: str) -> dict[str, str]:
    """`image=COLUMN&text=COLUMN` as a dict. Raises SourceError: another name."""
    columns = dict(parse_qsl(query))
    unknown = next((name for name in columns if name not in ("image", "text")), None)
    if unknown is not None:
        hint = nearest(unknown, ("image", "text"))
        raise SourceError(f"a table has no setting {unknown!r}{hint}; write ?image=COLUMN&text=COLUMN")
    return columns


def expand(pattern: str) -> list[Path]:
    """`a-{000..002}.tar` and `*`, sorted. Raises SourceError when nothing is there."""
    patterns = [pattern]
    while any(re.search(r"\{(\d+)\.\.(\d+)\}", p) for p in patterns):
        grown = []
        for p in patterns:
            found = re.search(r"\{(\d+)\.\.(\d+)\}", p)
            if not found:
                grown.append(p)
                continue
            first, last = found.groups()
            numbers = range(int(first), int(last) + 1)
            grown += [f"{p[: found.start()]}{n:0{len(first)}d}{p[found.end() :]}" for n in numbers]
        patterns = grown
    files: list[Path] = []
    for p in patterns:
        matches = sorted(glob.glob(os.path.expanduser(p))) if any(c in p for c in "*?[") else [os.path.expanduser(p)]
        files += [Path(match) for match in matches]
    missing = [file for file in files if not file.exists()]
    if missing or not files:
        raise SourceError(f"{pattern}: no such file{f' ({missing[0]}, {len(missing)} missing)' if missing else ''}")
    return files


class TarSource:
    """WebDataset shards: members whose names are equal up to the first dot are a sample, a picture and its captions.

    Captions are the lines of its `.txt`; of its `.en.txt`, `.de.txt` and so on where there is none; else what its `.json` holds.

    The headers are read once; after that any sample is one seek away. A shard that is cut short gives the samples before the cut and
    one problem that names it.

    Raises:
        SourceError: no shard holds anything.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.name = files[0].name if len(files) == 1 else f"{files[0].name}..{files[-1].name}"
        self.problems: list[tuple[str, str]] = []
        self.index: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, file in _shown(self.files):
            self._scan(number, file)
        if not self.index:
            file, why = self.problems[0] if self.problems else (str(files[0]), "no files are in it")
            raise SourceError(f"{self.name} holds no samples: {file}: {why}")
        self._open: OrderedDict[tuple[int, int], Any] = OrderedDict()
        """Files by process (a file position is not shared over a fork) and shard, the one that was read last at the end."""

    def _scan(self, number: int, file: Path) -> None:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                size = file.stat().st_size
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} reaches past the end of the file")
                    samples.setdefault(f"{folder}/{stem}" if folder else stem, {})[suffix.lower()] = (
                        member.offset_data,
                        member.size,
                    )
                # tarfile ends quietly at a header that is cut; a whole archive ends in a block of zeros
                archive.fileobj.seek(archive.offset)  # pyright: ignore[reportOptionalMemberAccess]
                if archive.fileobj.read(512) != bytes(512):  # pyright: ignore[reportOptionalMemberAccess]
                    raise tarfile.ReadError("it ends without an end mark")
        except (tarfile.TarError, OSError, EOFError) as error:
            damage = f"cut short or damaged after {len(samples)} samples: {error}"
            self.problems.append((str(file), (not samples and _compressed(file)) or damage))
        self.index += [(number, key, parts) for key, parts in samples.items()]

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, index: int) -> Sample:
        return Sample(*self.picture_at(index), self.captions_at(index))

    def picture_at(self, index: int) -> tuple[str, Any]:
        number, name, parts, members = self._member(index)
        suffix = next((s for s in parts if f".{s}" in IMAGE_SUFFIXES), None)
        if suffix is None:
            raise SampleError(f"{name}: no picture among its members ({members}); a picture is one of {', '.join(IMAGE_SUFFIXES)}")
        return name, NamedBytes(self._read(number, *parts[suffix]), f"{name}.{suffix}")

    def captions_at(self, index: int) -> list[str]:
        number, name, parts, members = self._member(index)
        written = ["txt"] if "txt" in parts else sorted(suffix for suffix in parts if suffix.endswith(".txt"))
        if written or "json" not in parts:
            texts = [line for suffix in written for line in lines_of(self._read(number, *parts[suffix]).decode("utf-8", "replace"))]
        else:
            try:
                texts = texts_of(json_object(self._read(number, *parts["json"])), None, TAR_CAPTIONS)
            except SampleError as error:
                raise SampleError(f"{name}.json: {error}") from error
        if not texts:
            number_only = " (a .cls is a class's number)" if "cls" in parts else ""
            raise SampleError(f"{name}: no caption in its members ({members}); {TAR_CAPTIONS}{number_only}")
        return texts

    def _member(self, index: int) -> tuple[int, str, dict[str, tuple[int, int]], str]:
        """(number of the shard, the sample's name, where its members are, their endings for a message)."""
        number, key, parts = self.index[index]
        return number, f"{self.files[number].name}/{key}", parts, ", ".join(f".{suffix}" for suffix in parts)

    def _read(self, number: int, offset: int, size: int) -> bytes:
        which = (os.getpid(), number)
        handle = self._open.pop(which, None) or self.files[number].open("rb")
        self._open[which] = handle
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        handle.seek(offset)
        return handle.read(size)


def _compressed(file: Path) -> str | None:
    """What to do about a file that is compressed although its name does not say so; None of any other."""
    with file.open("rb") as opened:
        start = opened.read(6)
    found = next((how for magic, how in COMPRESSED.items() if start.startswith(magic)), None)
    return found and f"no plain tar but compressed with {found} it first (a compressed shard has no random access)"


def _shown(files: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    """The files with their numbers; on a terminal with a bar once they have taken two seconds."""
    begun, numbered = time.monotonic(), list(enumerate(files))
    for number, file in numbered:
        if time.monotonic() - begun > 2:
            quiet = os.environ.get("RANK", "0") != "0"  # of the processes of a torchrun the first shows it
            yield from track(
                numbered[number:],
                "scanning shards",
                console=Console(stderr=True),
                transient=True,
                completed=number,
                total=len(files),
                disable=quiet,
            )
            return
        yield number, file


class TableSource:
    """Samples that are records: a subclass says what record a number is."""

    columns: dict[str, str]
    allow_urls: bool

    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        """(name, folder that its paths are relative to, the record or the line of JSON that it is).

        Args:
            words: columns that can hold no caption may be left out.
        """
        raise NotImplementedError("a table's subclass reads its records")

    def __getitem__(self, index: int) -> Sample:
        key, folder, record = self._record(index)
        with _naming(key):
            record = json_object(record) if isinstance(record, str) else record
            return Sample(key, self._picture(key, folder, record), texts_of(record, self.columns.get("text")))

    def picture_at(self, index: int) -> tuple[str, Any]:
        key, folder, record = self._record(index)
        with _naming(key):
            return key, self._picture(key, folder, json_object(record) if isinstance(record, str) else record)

    def captions_at(self, index: int) -> list[str]:
        key, _, record = self._record(index, words=True)
        with _naming(key):
            return texts_of(json_object(record) if isinstance(record, str) else record, self.columns.get("text"))

    def _picture(self, key: str, folder: Path, record: dict[str, Any]) -> Any:
        image = image_of(record, self.columns.get("image"), folder, self.allow_urls)
        return NamedBytes(image, key) if isinstance(image, bytes) else image


@contextmanager
def _naming(key: str):
    """A reject from within begins with the record's name."""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{key}: {error}") from error


class LinesSource(TableSource):
    """JSONL, CSV or TSV: one record a line, pictures as paths beside the file, as base64 or data URIs, or as addresses.

    Raises:
        SourceError: a CSV or TSV that cannot be split into fields.
    """

    def __init__(self, files: Sequence[Path], columns: dict[str, str], allow_urls: bool):
        self.files, self.columns, self.allow_urls = list(files), columns, allow_urls
        self.name = files[0].name
        self.problems: list[tuple[str, str]] = []
        self.records: list[tuple[int, int, Any]] = []
        for number, file in enumerate(self.files):
            if file.suffix.lower() == ".jsonl":
                with file.open(encoding="utf-8", errors="replace") as lines:
                    self.records += [(number, line, text) for line, text in enumerate(lines, 1) if text.strip()]
            else:
                csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
                with file.open(encoding="utf-8", errors="replace", newline="") as lines:
                    rows = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                    try:
                        self.records += [(number, line, row) for line, row in enumerate(rows, 2)]
                    except csv.Error as error:
                        raise SourceError(f"{file}:{rows.line_num}: not readable as a table: {error}") from error

    def __len__(self) -> int:
        return len(self.records)

    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        number, line, record = self.records[index]
        file = self.files[number]
        return f"{file.name}:{line}", file.parent, record


class ParquetSource(TableSource):
    """Parquet through `datasets`: memory-mapped, so that a global shuffle costs one read a sample."""

    def __init__(self, files: Sequence[Path], columns: dict[str, str], allow_urls: bool):
        import datasets

        self.files, self.name, self.folder = list(files), files[0].name, files[0].parent
        self.columns, self.allow_urls = columns, allow_urls
        self.problems: list[tuple[str, str]] = []
        try:
            table = datasets.Dataset.from_parquet([str(file) for file in files])
        except Exception as error:  # pyarrow and datasets raise a dozen kinds for a damaged file
            raise SourceError(f"{files[0]}: not readable as parquet: {error}") from error
        assert isinstance(table, datasets.Dataset)
        for column, feature in list(table.features.items()):
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        self.table = table
        binary = [name for name, kind in table.features.items() if _holds_bytes(kind)]
        self.words = table.remove_columns(binary)
        """The same without the columns of pictures, which are not read for a caption."""

    def __len__(self) -> int:
        return len(self.table)

    def _record(self, index: int, *, words: bool = False) -> tuple[str, Path, str | dict[str, Any]]:
        return f"{self.name}:{index}", self.folder, (self.words if words else self.table)[index]


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this feature may hold encoded pictures. (A struct of texts by language does not.)"""
    import datasets

    if isinstance(kind, dict):
        return "bytes" in kind
    return isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and "binary" in kind.dtype)


class FolderSource:
    """Pictures under a folder. Captions come from `metadata.jsonl` / `metadata.csv` (Hugging Face's imagefolder: `file_name` and a
    text column), else from a `.txt` beside the picture (a caption a line), else from the name of the folder the picture is in.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.problems: list[tuple[str, str]] = []
        self.files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise SourceError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
        self.captions: dict[str, list[str]] = {}
        for table in (folder / "metadata.jsonl", folder / "metadata.csv"):
            if table.exists():
                lines = LinesSource([table], {}, False)
                for index, (_, line, record) in enumerate(lines.records):
                    try:
                        row = json_object(record) if isinstance(record, str) else lines.records[index][2]
                        self.captions.setdefault(str(row["file_name"]), []).extend(texts_of(row, None))
                    except (SampleError, KeyError) as error:
                        self.problems.append((f"{table.name}:{line}", f"not a caption record: {error}"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        return Sample(f"{self.name}/{file.relative_to(self.folder).as_posix()}", str(file), self.captions_at(index))

    def picture_at(self, index: int) -> tuple[str, Any]:
        return str(self.files[index]), str(self.files[index])

    def captions_at(self, index: int) -> list[str]:
        file = self.files[index]
        relative = file.relative_to(self.folder)
        beside = file.with_suffix(".txt")
        texts = self.captions.get(relative.as_posix())
        if texts is None and beside.exists():
            texts = lines_of(beside.read_text(encoding="utf-8", errors="replace"))
        elif texts is None and file.parent != self.folder:
            texts = [file.parent.name.replace("_", " ").replace("-", " ")]
        if not texts:
            raise SampleError(f"{relative}: no caption (no metadata row, no {beside.name}, not in a named folder)")
        return texts


def open_pairs(
    rest: str, *, seed: int, allow_urls: bool = False, to_talk: Callable[[str, Sample], Any] | None = None
) -> StreamSource:
    """`owner/name[:split][?image=COLUMN&text=COLUMN]`: pictures with captions, streamed.

    Args:
        to_talk: makes something else of each sample and its key (a conversation).
    """
    name, _, query = rest.partition("?")
    return open_hub(name, seed=seed, to_sample=partial(_pair, columns_of(query), allow_urls, to_talk))


def _pair(columns: dict[str, str], allow_urls: bool, to_talk: Any, key: str, record: dict[str, Any]) -> Any:
    inside = record.get("json")
    if isinstance(inside, dict):  # a tar's .json beside a picture
        record = {**inside, **record}
    if "__key__" in record and isinstance(record.get("txt"), str):  # a tar's .txt: as when it is read from a file
        record = {**record, "txt": lines_of(record["txt"])}
    image = open_image(image_of(record, columns.get("image"), Path(), allow_urls))
    sample = Sample(key, image, texts_of(record, columns.get("text")))
    return to_talk(key, sample) if to_talk is not None else sample


def open_hub(rest: str, *, seed: int, to_sample: Callable[[str, dict[str, Any]], Any]) -> StreamSource:
    """`owner/name[:split]`, streamed by `datasets`; also a local folder of shards that `datasets` knows how to stream.

    Args:
        to_sample: what a record becomes, from its key and content.
    """
    import datasets

    name, _, split = rest.partition(":")
    try:
        stream = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # the hub's client raises many kinds
        raise SourceError(f"cannot stream {name}: {error}") from error
    assert isinstance(stream, datasets.IterableDataset)
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    return StreamSource(name, stream, to_sample, seed=seed)


def json_object(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SampleError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SampleError(f"a JSON {type(value).__name__} where an object was expected")
    return value


def image_of(record: dict[str, Any], column: str | None, folder: Path, allow_urls: bool) -> Any:
    """The picture of a record: bytes, `{"bytes", "path"}`, a path relative to `folder`, base64 of a data URI, or an address.

    Raises:
        SampleError: there is none, it is of a type that no picture is of, or its address cannot be fetched.
    """
    value = record.get(_column(record, column, IMAGE_COLUMNS, "picture", "name it with ?image=COLUMN"))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            return fetch(value, allow_urls)
        if value.startswith("data:"):
            try:
                return base64.b64decode(value.partition(",")[2], validate=True)
            except binascii.Error as error:
                raise SampleError(f"a data URI that is not base64: {error}") from error
        return _plain_base64(value) or str(folder / value)
    if value is None:
        raise SampleError("the picture is empty")
    if not isinstance(value, bytes | Image.Image | np.ndarray):
        kind = type(value).__name__
        raise SampleError(f"the picture is {str(value)[:40]}, of type {kind}, and not bytes, base64, a path or an address")
    return value


def _plain_base64(value: str) -> bytes | None:
    """The bytes of a picture that is written out: longer than a name, and of letters that no name with a suffix is made of."""
    try:
        return base64.b64decode(value, validate=True) if len(value) > LONGEST_NAME else None
    except binascii.Error:
        return None


def lines_of(text: str) -> list[str]:
    """Captions written one a line: stripped, empty ones left out."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def texts_of(record: dict[str, Any], column: str | None, advice: str = NAME_A_COLUMN) -> list[str]:
    """All captions of a record, stripped, empty ones left out: a text, a list of them, or either by language (`{"en": ..., "de": ...}`).

    Args:
        advice: what an error says can be done.

    Raises:
        SampleError: there is none.
    """
    value = record.get(_column(record, column, TEXT_COLUMNS, "caption", advice))
    values: list[Any] = []
    if isinstance(value, dict) and all(LANGUAGE.fullmatch(str(name)) for name in value):
        given = list(value.values())
    else:
        given = [value]
    for one in given:
        values += one if isinstance(one, list | tuple) else [one]
    if any(isinstance(text, dict) for text in values):
        raise SampleError(f"the caption is an object and no text; {advice}")
    texts = [str(text).strip() for text in values if text is not None and str(text).strip()]
    if not texts:
        raise SampleError("the caption is empty")
    return texts


def _column(record: dict[str, Any], column: str | None, known: tuple[str, ...], what: str, advice: str) -> str:
    if column is not None and column in record:
        return column
    found = next((name for name in known if column is None and name in record), None)
    if found is None:
        raise SampleError(f"no {what} column among {', '.join(map(str, record))}; {advice}")
    return found


def fetch(address: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise SampleError(f"{address}: pictures by address are off; data.allow_urls=true fetches them")
    try:
        with urllib.request.urlopen(address, timeout=URL_TIMEOUT) as response:
            return response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:  # the last two: an address that is none, a reply cut short
        raise SampleError(f"{address}: {error}") from error
