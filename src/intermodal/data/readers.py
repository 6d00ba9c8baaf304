"""Sources by name, for what people have: WebDataset tar shards, parquet, JSONL, CSV, folders of pictures, hub data sets."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from ..config import override
from ..errors import nearest
from .folders import FolderSource
from .hub import open_pairs
from .records import columns_of
from .source import Source, SourceError
from .stream import StreamSource
from .tables import LinesSource, ParquetSource
from .tars import TAR_CAPTIONS, TarSource


def open_source(spec: str, *, side: int = 64, seed: int = 0, allow_urls: bool = False) -> Source | StreamSource:
    """A source from its name on the command line.

    Args:
        spec: `scenes:core`, `scenes:all` (with settings of `SceneConfig` as `?pair_share=0.3&forms=3`), `sprites:core`,
            `sprites:all`, `signs` (printed words, with settings of `SignConfig`), `tuxpaint:<.deb or folder>` (with settings of
            `TuxPaintConfig`), `hf:<owner/name>[:split]`, or a path: a folder of pictures, or files ending in .tar, .parquet, .jsonl,
            .csv, with `{000..009}` and `*` expanded and several such patterns joined by `::`. `?image=COLUMN&text=COLUMN` after a
            table's path or a hub data set names its columns; folders and tars have none.
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
    folder = next((file for file in files if file.is_dir()), None)
    if folder is not None and len(files) > 1:
        raise SourceError(
            f"{path}: {folder} is a folder, and only files can be one source; give each folder as a source of its own"
        )
    if folder is not None:
        if query:
            raise SourceError(
                f"{path}: a folder has no columns, so ?{query} has no meaning; captions come from metadata.jsonl or metadata.csv, "
                f"from a .txt beside a picture, or from the names of folders"
            )
        return FolderSource(folder)
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


def expand(pattern: str) -> list[Path]:
    """The files of `a-{000..002}.tar`, of `*` (sorted), and of several such joined by `::` (open_clip, webdataset) one after the other.

    Raises:
        SourceError: nothing is there, or a file of those named is not.
    """
    if "::" in pattern and not os.path.exists(pattern):
        if not all(pattern.split("::")):
            raise SourceError(f"{pattern}: one of the names joined by :: is empty")
        return [file for part in pattern.split("::") for file in expand(part)]
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
