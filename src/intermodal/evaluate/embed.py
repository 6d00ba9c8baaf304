"""`intermodal embed` and `search`: embeddings on disk, written in parts so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import track

from ..data.loader import ENDLESS
from ..data.readers import FolderSource, SourceError, open_source
from ..data.stream import StreamSource
from ..errors import IntermodalError, SampleError
from ..inputs.image import open_image
from ..models.clip import DualEncoder
from ..weights.load import load_encoder

PART = 2048
"""Items of one part file."""


def embed_source(
    model: str | DualEncoder, spec: str, out: Path, batch: int = 64, *, allow_urls: bool = False, progress: bool = True
) -> tuple[int, int, int]:
    """Embed every item of a source into `out` (.parquet with key and vector, or .npy with a `.keys.json` beside it).

    Parts are written as they are done into `out` + ".parts"; a later call with the same weights and source skips those that are
    there. A `.txt` source embeds its lines as texts.

    Returns:
        (embeddings made now, embeddings found, rejected items); the rejects are named in `out` + ".rejects.jsonl".

    Raises:
        IntermodalError: an endless source, an unknown ending of `out`, or parts of another job.
    """
    if out.suffix not in (".parquet", ".npy"):
        raise IntermodalError(f"{out}: embeddings are written to .parquet or .npy")
    encoder = load_encoder(model) if isinstance(model, str) else model
    length, item, encode = _items(encoder, spec, allow_urls)
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    _same_job(parts, {"weights": _fingerprint(encoder), "source": spec, "length": length})
    made = found = 0
    for start in track(range(0, length, PART), "embedding", transient=True, disable=not progress or length < PART):
        file = parts / f"{start:010d}.parquet"
        if file.exists():
            found += pq.read_metadata(file).num_rows
            continue
        keys, vectors, rejects = [], [], []
        for low in range(start, min(start + PART, length), batch):
            ready: list[Any] = []
            for index in range(low, min(low + batch, start + PART, length)):
                try:
                    key, value = item(index)
                    ready.append(value)
                    keys.append(key)
                except SampleError as error:
                    rejects.append({"key": f"{spec}/{index}", "reason": str(error)})
            if ready:
                vectors.append(encode(ready))
        rows = torch.cat(vectors).numpy() if vectors else np.empty((0, encoder.config.embed_width), np.float32)
        _write_part(file, keys, rows, rejects)
        made += len(keys)
    rejected = _join(parts, out)
    return made, found, rejected


def _items(encoder: DualEncoder, spec: str, allow_urls: bool = False):
    """(how many, number -> (key, value), values -> vectors) of a source of pictures or a file of lines."""
    if spec.endswith(".txt"):
        lines = Path(spec).read_text(encoding="utf-8").splitlines()
        return len(lines), lambda i: (f"{spec}:{i + 1}", lines[i]), encoder.embed_texts
    path = Path(spec).expanduser()
    source = (
        FolderSource(path) if path.is_dir() else open_source(spec, side=encoder.config.vision.image_size, allow_urls=allow_urls)
    )
    if isinstance(source, StreamSource) or len(source) >= ENDLESS:
        raise SourceError(f"{spec} has no end: embed takes a folder, a table or shards")

    def item(index: int) -> tuple[str, Any]:
        if isinstance(source, FolderSource):  # pictures need no caption here
            return str(source.files[index]), open_image(str(source.files[index]))
        sample = source[index]
        return sample.key, open_image(sample.image)

    return len(source), item, encoder.embed_images


def _fingerprint(encoder: DualEncoder) -> str:
    """Of the beginning of every weight: another training of the same model at the same path is another model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _same_job(parts: Path, job: dict[str, Any]) -> None:
    file = parts / "job.json"
    if file.exists() and json.loads(file.read_text()) != job:
        raise IntermodalError(
            f"{parts} holds parts of another job, of other weights or another source ({file.read_text()}); remove it or give another --out"
        )
    file.write_text(json.dumps(job))


def _write_part(file: Path, keys: list[str], rows: np.ndarray, rejects: list[dict[str, str]]) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    partial = file.with_suffix(".partial")
    pq.write_table(pa.table({"key": pa.array(keys, pa.string()), "embedding": vectors}), partial)
    file.with_suffix(".rejects.json").write_text(json.dumps(rejects))
    partial.rename(file)


def _join(parts: Path, out: Path) -> int:
    """One file from the parts; the parts go once it is whole."""
    files = sorted(parts.glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files]) if files else pa.table({"key": [], "embedding": []})
    partial = out.with_name(out.name + ".partial")
    if out.suffix == ".parquet":
        pq.write_table(table, partial)
    else:
        with partial.open("wb") as file:
            np.save(file, _matrix(table))
        out.with_name(out.name + ".keys.json").write_text(json.dumps(table["key"].to_pylist()))
    os.replace(partial, out)
    rejects = [reject for file in files for reject in json.loads(file.with_suffix(".rejects.json").read_text())]
    listing = out.with_name(out.name + ".rejects.jsonl")
    if rejects:
        listing.write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    for file in parts.iterdir():
        file.unlink()
    parts.rmdir()
    return len(rejects)


def _matrix(table: pa.Table) -> np.ndarray:
    rows = table["embedding"].combine_chunks()
    return rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1) if len(rows) else np.empty((0, 0), np.float32)


def search(model: str | DualEncoder, where: str, sentence: str, top: int) -> list[tuple[str, float]]:
    """The `top` pictures nearest to a sentence: (key, cosine). `where` is a folder, or parquet or .npy written by `embed`."""
    encoder = load_encoder(model) if isinstance(model, str) else model
    if where.endswith(".parquet") and "embedding" in pq.read_schema(where).names:
        table = pq.read_table(where)
        keys, image = table["key"].to_pylist(), torch.from_numpy(_matrix(table).copy())
    elif where.endswith(".npy"):
        names = Path(where + ".keys.json")
        if not names.exists():
            raise IntermodalError(
                f"{where} has no {names.name} beside it, which `embed` writes: there is no telling whose rows they are"
            )
        keys, image = json.loads(names.read_text()), torch.from_numpy(np.load(where))
    else:
        keys, rows = [], []
        for key_batch, vectors in _embedded(encoder, where):
            keys += key_batch
            rows.append(vectors)
        image = torch.cat(rows) if rows else torch.empty(0, encoder.config.embed_width)
    if image.ndim == 2 and image.shape[1] != encoder.config.embed_width and len(image):
        raise IntermodalError(
            f"{where} holds vectors of {image.shape[1]} numbers, the model's have {encoder.config.embed_width}: they are another model's"
        )
    if not len(image):
        raise IntermodalError(f"{where} holds no readable picture")
    scores = image @ encoder.embed_texts([sentence])[0]
    best = scores.topk(min(top, len(scores)))
    return [(keys[i], float(s)) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _embedded(encoder: DualEncoder, where: str, batch: int = 64) -> Iterator[tuple[list[str], torch.Tensor]]:
    length, item, encode = _items(encoder, where)
    for start in track(range(0, length, batch), "embedding", disable=length < 500, transient=True):
        keys, ready = [], []
        for index in range(start, min(start + batch, length)):
            try:
                key, value = item(index)
            except SampleError as error:
                print(f"skipped item {index} of {where}: {error}", file=sys.stderr)  # stdout may be JSON
                continue
            keys.append(key)
            ready.append(value)
        if ready:
            yield keys, encode(ready)
