"""Data sets of the hub and folders of remote shards, streamed through `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..inputs.image import open_image
from .records import CLASS_NUMBER, IMAGE_SUFFIXES, NAME_A_COLUMN, caption_names, columns_of, image_of, lines_of, texts_of
from .source import NamedBytes, Sample, SourceError
from .stream import StreamSource


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
    if "__key__" in record:
        record = _of_a_tar(record, columns)
    image = image_of(record, columns.get("image"), Path(), allow_urls)
    image = NamedBytes(image, key) if isinstance(image, bytes) else image
    decoded = open_image(image)  # what cannot be is told now, while another record can take its place
    advice = f"{NAME_A_COLUMN}; {CLASS_NUMBER}" if "cls" in record else NAME_A_COLUMN
    texts = texts_of(record, columns.get("text"), advice)
    if to_talk is not None:
        return to_talk(key, Sample(key, decoded, texts))
    return Sample(key, image, texts)  # encoded it is a tenth in memory and on its way to a worker, who decodes it again


def _of_a_tar(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A tar's members by their endings (None: other samples of the shard have such a one), with the picture and the captions that
    `TarSource` takes under the names that are looked for first, where no column was asked for. What is in its `.json` is beside them."""
    members = {name: value for name, value in record.items() if value is not None}
    inside = members.get("json")
    record = {**inside, **members} if isinstance(inside, dict) else members
    picture = next((members[name] for name in members if f".{name.lower()}" in IMAGE_SUFFIXES), None)
    if picture is not None and "image" not in columns:
        record = {**record, "image": picture}
    written = caption_names(name for name, value in members.items() if isinstance(value, str))
    if written and "text" not in columns:
        record = {**record, "caption": [line for name in written for line in lines_of(members[name])]}
    return record


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
