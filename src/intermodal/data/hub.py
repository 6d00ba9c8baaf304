"""Data sets of the hub and folders of remote shards, streamed through `datasets`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..inputs.image import open_image
from .records import (
    IMAGE_SUFFIXES,
    NAME_A_COLUMN,
    TAR_CAPTIONS,
    TEXT_COLUMNS,
    caption_names,
    columns_of,
    image_of,
    member_captions,
    texts_of,
)
from .source import NamedBytes, Sample, SourceError
from .stream import UNDECODABLE, UNDECODED, StreamSource
from .tables import class_names, with_names


def open_pairs(
    rest: str,
    *,
    seed: int,
    allow_urls: bool = False,
    classes: Sequence[str] | None = None,
    to_talk: Callable[[str, Sample], Any] | None = None,
) -> StreamSource:
    """`owner/name[@revision][:config][:split][?image=COLUMN&text=COLUMN]`: pictures with captions, streamed.

    Args:
        classes: what a tar's `.cls` means, or an integer in place of a caption, by its number.
        to_talk: makes something else of each sample and its key (a conversation).
    """
    name, _, query = rest.partition("?")
    return open_hub(name, seed=seed, to_sample=partial(pair_of, columns_of(query), allow_urls, to_talk, classes=classes))


def pair_of(
    columns: dict[str, str],
    allow_urls: bool,
    to_talk: Any,
    key: str,
    record: dict[str, Any],
    *,
    classes: Sequence[str] | None = None,
) -> Any:
    """A streamed record as a sample whose picture was tried, or what `to_talk` makes of it. Raises SampleError."""
    if "__key__" in record:
        record = _of_a_tar(record, columns, classes)
    image = image_of(record, columns.get("image"), Path(), allow_urls)
    image = NamedBytes(image, key) if isinstance(image, bytes) else image
    decoded = open_image(image)  # what cannot be is told now, while another record can take its place
    texts = texts_of(record, columns.get("text"), classes=classes)
    if to_talk is not None:
        return to_talk(key, Sample(key, decoded, texts))
    return Sample(key, image, texts)  # encoded it is a tenth in memory and on its way to a worker, who decodes it again


def _of_a_tar(record: dict[str, Any], columns: dict[str, str], classes: Sequence[str] | None) -> dict[str, Any]:
    """A tar's members by their endings (None: other samples of the shard have such a one), with the picture and the captions that
    `TarSource` takes under the names that are looked for first, where no column was asked for. What is in its `.json` is beside them.

    Raises SampleError: it has no caption, or its `.cls` is none of `classes`."""
    members = {name: value for name, value in record.items() if value is not None}
    inside = members.get("json")
    record = {**inside, **members} if isinstance(inside, dict) else members
    picture = next((members[name] for name in members if f".{name.lower()}" in IMAGE_SUFFIXES), None)
    if picture is not None and "image" not in columns:
        record = {**record, "image": picture}
    endings = [name for name in members if not name.startswith("__")]
    # a table's rows may have a __key__ too: its captions are texts, where members like .caption are bytes, which no tar's captions are
    column = any(name in members and not isinstance(members[name], bytes) for name in TEXT_COLUMNS)
    if "text" not in columns and (caption_names(endings) or not column):
        advice = f"{TAR_CAPTIONS}; or {NAME_A_COLUMN}" if "__url__" in members else TAR_CAPTIONS  # the hub's have columns
        captions = member_captions(str(members["__key__"]), endings, members.__getitem__, classes, advice)
        record = {**record, "caption": captions}
    return record


def open_hub(rest: str, *, seed: int, to_sample: Callable[[str, dict[str, Any]], Any]) -> StreamSource:
    """`owner/name[@revision][:config][:split]`, streamed by `datasets`; also a local folder of shards that `datasets` knows how to
    stream. One part after the name is a split, `train` where there is none.

    Args:
        to_sample: what a record becomes, from its key and content.

    Raises:
        SourceError: more parts than that, or `datasets` cannot stream it.
    """
    import datasets

    address, *parts = rest.split(":")
    if len(parts) > 2:
        raise SourceError(f"hf:{rest}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with @REVISION after the name")
    name, _, revision = (address, "", "") if os.path.exists(address) else address.partition("@")
    config = parts[0] if len(parts) == 2 else None
    try:
        stream = datasets.load_dataset(
            name, config, split=(parts[-1] if parts else "") or "train", revision=revision or None, streaming=True
        )
    except Exception as error:  # the hub's client raises many kinds
        hint = "; of several configurations name one: hf:NAME:CONFIG:SPLIT" if config is None and "onfig" in str(error) else ""
        hint = f"; {UNDECODABLE}" if isinstance(error, UNDECODED) else hint
        raise SourceError(f"cannot stream {address}: {error}{hint}") from error
    assert isinstance(stream, datasets.IterableDataset)
    named = class_names(stream.features or {})
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    # another configuration is other data, which a run must not be resumed on; names without one are as they were
    to_sample = partial(_named, named, to_sample) if named else to_sample
    return StreamSource(f"{address}:{config}" if config else address, stream, to_sample, seed=seed)


def _named(named: dict[str, list[str]], to_sample: Callable[[str, dict[str, Any]], Any], key: str, record: dict[str, Any]) -> Any:
    """What a record becomes once its classes are names."""
    return to_sample(key, with_names(record, named))
