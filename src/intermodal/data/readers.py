"""Sources by name, for what people have: WebDataset tar shards, parquet, JSONL, CSV, folders of pictures, hub data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..config import override
from ..errors import nearest
from .folders import FolderSource
from .hub import open_pairs
from .patterns import expand
from .records import TAR_CAPTIONS, columns_of
from .source import Source, SourceError
from .stream import StreamSource
from .tables import LinesSource, ParquetSource
from .tar_streams import is_streamed, open_shards
from .tars import TarSource

QUERY = re.compile(r"\?(?=[^/?=&]*=)|\?$")
"""Before a table's columns: any other `?` in a path is, as `*`, of a pattern."""


def open_source(
    spec: str, *, side: int = 64, seed: int = 0, allow_urls: bool = False, classes: Sequence[str] | None = None
) -> Source | StreamSource:
    """A source from its name on the command line.

    Args:
        spec: `scenes:core`, `scenes:all` (with settings of `SceneConfig` as `?pair_share=0.3&forms=3`), `sprites:core`,
            `sprites:all`, `signs` (printed words, with settings of `SignConfig`), `tuxpaint:<.deb or folder>` (with settings of
            `TuxPaintConfig`), `hf:<owner/name>[@revision][:config][:split]`, tars that are streamed (`pipe:COMMAND`, `https://`, `s3://`,
            `gs://`; `tar_streams`), or a path: a folder of pictures, or files ending in .tar, .parquet, .jsonl, .csv. In shards' names
            `{000..009}`, `{a,b}` and (in paths) `*` and `?` are expanded, and several such patterns are joined by `::`.
            `?image=COLUMN&text=COLUMN` after a table's path or a hub data set names its columns; folders and tars have none.
        side: pixels of a side for sources that draw their pictures.
        allow_urls: fetch pictures that a table names by http(s) address.
        classes: labels by number, of which a tar's sample takes that of its `.cls` as its caption where it has no `.txt`, and a table's
            record that of an integer in the place of its caption.

    Raises:
        SourceError: nothing there, nothing readable, or a setting that the source does not have.
    """
    kind, _, rest = spec.partition(":")
    drawn = _drawn(spec, side, seed)
    if drawn is not None:
        return drawn
    if kind == "hf" and not rest.startswith("//"):  # hf:// is a file of the hub
        return open_pairs(rest, seed=seed, allow_urls=allow_urls, classes=classes)
    if is_streamed(spec):
        return open_shards(spec, seed=seed, classes=classes)
    found = QUERY.search(spec)
    path, query = (spec[: found.start()], spec[found.end() :]) if found else (spec, "")
    return _from_files(path, query, allow_urls, classes)


def _drawn(spec: str, side: int, seed: int) -> Source | None:
    """The source of pictures that we draw or keep ourselves, where `spec` names one."""
    from .drawn import SpriteConfig, SpriteSource
    from .scenes import SceneConfig, Scenes
    from .signs import SignConfig, Signs
    from .tuxpaint import TuxPaint, TuxPaintConfig

    name, _, query = spec.partition("?")
    kind, _, rest = name.partition(":")
    settings = [assignment for assignment in query.split("&") if assignment]
    if kind in ("scenes", "sprites"):
        which = rest or "core"
        if which not in ("core", "all"):
            raise SourceError(f"{spec!r}: {kind} come as {kind}:core or {kind}:all{nearest(which, ('core', 'all'))}")
        if kind == "sprites":
            return SpriteSource(override(SpriteConfig(side=side, concepts=which), settings))
        return Scenes(override(SceneConfig(side=side, concepts=which, seed=seed), settings))
    if name == "signs":
        return Signs(override(SignConfig(side=side, seed=seed), settings))
    if kind == "tuxpaint":
        return TuxPaint(rest, override(TuxPaintConfig(), settings))
    return None


def _from_files(path: str, query: str, allow_urls: bool, classes: Sequence[str] | None) -> Source:
    """The source of a folder, or of files that are all of one kind."""
    if not path:
        raise SourceError("the name of a source is empty: give a folder, files or one of docs/data.md; the folder you are in is .")
    files = expand(path)
    folder = next((file for file in files if file.is_dir()), None)
    if folder is not None and len(files) > 1:
        raise SourceError(
            f"{path}: {folder} is a folder, and only files can be one source; give each folder as a source of its own"
        )
    if folder is not None:
        if query:
            raise SourceError(
                f"{path}: a folder has no columns, so ?{query} has no meaning; captions come from metadata.jsonl, .csv or .parquet, "
                f"from a .txt beside a picture, or from the names of folders"
            )
        return FolderSource(folder, classes)
    suffixes = {file.suffix.lower() for file in files}
    if len(suffixes) != 1:
        raise SourceError(f"{path}: files of several kinds ({', '.join(sorted(suffixes))}); give one source a kind")
    suffix = suffixes.pop()
    if suffix == ".tar":
        if query:
            raise SourceError(f"{path}: a tar has no columns, so ?{query} has no meaning; {TAR_CAPTIONS}")
        return TarSource(files, classes)
    columns = columns_of(query)
    if suffix in (".parquet", ".jsonl", ".csv", ".tsv"):
        table = (ParquetSource if suffix == ".parquet" else LinesSource)(files, columns, allow_urls, classes)
        if not len(table):
            raise SourceError(f"{path}: {'they hold' if len(files) > 1 else 'it holds'} no records")
        return table
    if suffix in (".gz", ".zst", ".xz"):
        raise SourceError(
            f"{files[0]}: a compressed shard has no random access; unpack it to .tar first (pictures do not shrink anyway)"
        )
    raise SourceError(f"{files[0]}: unknown kind {suffix!r}; readable are a folder, .tar, .parquet, .jsonl, .csv, .tsv")
