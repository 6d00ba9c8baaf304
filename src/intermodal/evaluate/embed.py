"""`intermodal embed` and `search`: embeddings on disk, written in parts so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import track

from ..data.loader import ENDLESS
from ..data.readers import FolderSource, SourceError, open_source
from ..data.source import Apart, Reject
from ..data.stream import StreamSource
from ..errors import IntermodalError, SampleError
from ..files import read_json, read_lines
from ..inputs.image import open_image
from ..models.clip import DualEncoder
from ..weights.load import load_encoder

PART = 2048
"""Items of one part file."""
WEIGHTS = "intermodal.weights"
"""In what `embed` writes: the fingerprint of the model's weights, in a parquet's metadata or the JSON file beside a .npy."""


@dataclass(frozen=True)
class Items:
    """What is to be embedded, by number."""

    length: int
    item: Callable[[int], tuple[str, Any]]
    """Number -> key and value. Raises SampleError."""
    encode: Callable[[list[Any]], torch.Tensor]
    problems: list[Reject]
    """Files that were not read, or not to their end."""
    files: Sequence[Path]


def embed_source(
    model: str | DualEncoder,
    spec: str,
    out: Path,
    batch: int = 64,
    *,
    allow_urls: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> tuple[int, int, int]:
    """Embed every item of a source into `out` (.parquet with key and vector, or .npy with a `.keys.json` beside it).

    Parts are written as they are done into `out` + ".parts"; a later call with the same weights and source skips those that are
    there. A `.txt` source embeds its lines as texts. Pictures need no captions.

    Returns:
        (embeddings made now, embeddings found, rejected items and files); the rejects are named in `out` + ".rejects.jsonl".

    Raises:
        IntermodalError: an endless source, an unknown ending of `out`, parts of another job, or nothing that can be embedded.
    """
    if out.suffix not in (".parquet", ".npy"):
        raise IntermodalError(f"{out}: embeddings are written to .parquet or .npy")
    encoder = encoder_on(model, device)
    items = _items(encoder, spec, allow_urls)
    length = items.length
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    weights = _fingerprint(encoder)
    _same_job(parts, {"weights": weights, "source": spec, "length": length, "files": _files(items.files)})
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
                    key, value = items.item(index)
                    ready.append(value)
                    keys.append(key)
                except SampleError as error:
                    rejects.append({"key": f"{spec}/{index}", "reason": str(error)})
            if ready:
                vectors.append(items.encode(ready))
        rows = torch.cat(vectors).numpy() if vectors else np.empty((0, encoder.config.embed_width), np.float32)
        _write_part(file, keys, rows, rejects)
        made += len(keys)
    rejects = [asdict(problem) for problem in items.problems] + _rejected(parts)
    if not made + found:
        _clear(parts)  # a call that can read them, say with --allow-urls, begins anew
        first = "; ".join(f"{reject['key']}: {reject['reason']}" for reject in rejects[:3])
        raise IntermodalError(f"{spec}: none of its {length} items can be embedded{f'; the first reasons: {first}' * bool(first)}")
    _join(parts, out, rejects, weights)
    return made, found, len(rejects)


def encoder_on(model: str | DualEncoder, device: str | None) -> DualEncoder:
    """A model by name on a device, by default on a GPU where there is one; one that is loaded stays where it is.

    Raises:
        IntermodalError: no such device.
    """
    if not isinstance(model, str):
        return model
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] == "meta":  # PyTorch's device of tensors without content
        raise IntermodalError("--device meta holds no weights to compute with; give cpu, cuda or cuda:0")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second: a torch that is built without
        reason = str(error).splitlines()[0]
        raise IntermodalError(f"--device {device} cannot be used here ({reason}); give cpu, cuda or cuda:0") from None
    return load_encoder(model, device=device)


def problems_of(source: Any) -> list[Reject]:
    """The files of a source that could not be read, or not to their end."""
    return [Reject(key, reason) for key, reason in getattr(source, "problems", [])]


def _items(encoder: DualEncoder, spec: str, allow_urls: bool = False) -> Items:
    """The pictures of a source, or the lines of a file."""
    if spec.endswith(".txt"):
        lines = read_lines(Path(spec))
        return Items(len(lines), lambda i: (f"{spec}:{i + 1}", lines[i]), encoder.embed_texts, [], [Path(spec)])
    path = os.path.expanduser(spec)
    source = (
        FolderSource(Path(path))
        if os.path.isdir(path)
        else open_source(spec, side=encoder.config.vision.image_size, allow_urls=allow_urls)
    )
    if isinstance(source, StreamSource) or len(source) >= ENDLESS:
        raise SourceError(f"{spec} is a stream or has no end: embed takes a folder, a table or shards that are files")

    def item(index: int) -> tuple[str, Any]:
        if isinstance(source, Apart):  # a picture without a caption is embedded too
            key, picture = source.picture_at(index)
        else:
            sample = source[index]
            key, picture = sample.key, sample.image
        return key, open_image(picture)

    folder = isinstance(source, FolderSource)  # what is wrong with its captions is no matter here
    return Items(len(source), item, encoder.embed_images, [] if folder else problems_of(source), getattr(source, "files", []))


def _fingerprint(encoder: DualEncoder) -> str:
    """Of the beginning of every weight: another training of the same model at the same path is another model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.detach().flatten()[:1024].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _files(files: Sequence[Path]) -> str:
    """Of names, sizes and times of change: files that were swapped or written anew are another source."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        found = file.stat()
        digest.update(f"{file}\t{found.st_size}\t{found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _same_job(parts: Path, job: dict[str, Any]) -> None:
    file = parts / "job.json"
    before = json.loads(file.read_text()) if file.exists() else job
    other = [name for name in job if before.get(name) != job[name]]
    if other:
        raise IntermodalError(
            f"{parts} holds parts of another job: its {' and '.join(other)} were others ({file.read_text()}); remove it "
            f"or give another --out"
        )
    file.write_text(json.dumps(job))


def _write_part(file: Path, keys: list[str], rows: np.ndarray, rejects: list[dict[str, str]]) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    partial = file.with_suffix(".partial")
    pq.write_table(pa.table({"key": pa.array(keys, pa.string()), "embedding": vectors}), partial)
    file.with_suffix(".rejects.json").write_text(json.dumps(rejects))
    partial.rename(file)


def _rejected(parts: Path) -> list[dict[str, str]]:
    return [reject for file in sorted(parts.glob("*.rejects.json")) for reject in json.loads(file.read_text())]


def _join(parts: Path, out: Path, rejects: list[dict[str, str]], weights: str) -> None:
    """One file from the parts, with the fingerprint of the weights; the parts go once it is whole."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(parts.glob("*.parquet"))])
    partial = out.with_name(out.name + ".partial")
    if out.suffix == ".parquet":
        pq.write_table(table.replace_schema_metadata({WEIGHTS: weights}), partial)
    else:
        with partial.open("wb") as file:
            np.save(file, _matrix(table))
        out.with_name(out.name + ".keys.json").write_text(json.dumps(table["key"].to_pylist()))
        _model_file(out).write_text(json.dumps({WEIGHTS: weights}) + "\n")
    os.replace(partial, out)
    listing = out.with_name(out.name + ".rejects.jsonl")
    listing.unlink(missing_ok=True)
    if rejects:
        listing.write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    _clear(parts)


def _clear(parts: Path) -> None:
    for file in parts.iterdir():
        file.unlink()
    parts.rmdir()


def _matrix(table: pa.Table) -> np.ndarray:
    rows = table["embedding"].combine_chunks()
    return rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1) if len(rows) else np.empty((0, 0), np.float32)


def search(
    model: str | DualEncoder,
    where: str,
    sentence: str,
    top: int,
    *,
    device: str | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[list[tuple[str, float]], list[Reject]]:
    """The `top` pictures nearest to a sentence as (key, cosine), and what could not be read.

    Args:
        where: a folder, a table, shards, or parquet or .npy written by `embed`.
        tell: is given a warning where it is not known which model made the vectors.

    Raises:
        IntermodalError: the vectors are another model's, or there is nothing to rank.
    """
    encoder = encoder_on(model, device)
    rejects: list[Reject] = []
    kept = _kept(where)
    if kept is not None:
        keys, image, weights = kept
        _same_model(encoder, where, image, weights, tell)
    else:
        keys, rows = [], []
        for key_batch, vectors in _embedded(encoder, where, rejects):
            keys += key_batch
            rows.append(vectors)
        image = torch.cat(rows) if rows else torch.empty(0, encoder.config.embed_width)
    if not len(image):
        first = f"; the first reason: {rejects[0].key}: {rejects[0].reason}" if rejects else ""
        raise IntermodalError(f"{where} holds no readable picture{first}")
    scores = image @ encoder.embed_texts([sentence])[0]
    best = scores.topk(min(top, len(scores)))
    return [(keys[i], float(s)) for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)], rejects


def _model_file(out: Path) -> Path:
    return out.with_name(out.name + ".model.json")


def _kept(where: str) -> tuple[list[str], torch.Tensor, str | None] | None:
    """Keys, vectors (N, E) and the fingerprint of the weights (None: an older file) that `embed` wrote; None of any other source.

    Raises:
        IntermodalError: the file is cut short, or holds no key or no vector for each row.
    """
    try:
        if where.endswith(".npy"):
            kept = _of_npy(where)
        else:
            kept = _of_parquet(where) if where.endswith(".parquet") and os.path.isfile(where) else None
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        raise IntermodalError(f"{where} cannot be read ({error}); if `embed` wrote it, run that again") from error
    if kept is None:
        return None
    keys, vectors, weights = kept
    if vectors.ndim != 2 or len(keys) != len(vectors) or vectors.dtype.kind != "f":
        raise IntermodalError(
            f"{where} holds {vectors.dtype} vectors of shape {vectors.shape} for {len(keys)} keys, and not a vector of numbers for each: "
            f"run `embed` again"
        )
    return keys, torch.from_numpy(vectors.astype(np.float32)), weights


def _of_parquet(where: str) -> tuple[list[str], np.ndarray, str | None] | None:
    names = pq.read_schema(where).names
    if "embedding" not in names:
        return None  # a table of pictures
    if "key" not in names:
        raise IntermodalError(
            f"{where} has a column `embedding` and none called `key`, which `embed` writes: rename the column of names"
        )
    table = pq.read_table(where)
    weights = (table.schema.metadata or {}).get(WEIGHTS.encode())
    return table["key"].to_pylist(), _matrix(table), weights and weights.decode()


def _of_npy(where: str) -> tuple[list[str], np.ndarray, str | None]:
    names, beside = Path(where + ".keys.json"), _model_file(Path(where))
    if not names.exists():
        raise IntermodalError(
            f"{where} has no {names.name} beside it, which `embed` writes: there is no telling whose rows they are"
        )
    weights = read_json(beside).get(WEIGHTS) if beside.exists() else None
    return json.loads(names.read_text()), np.load(where), weights


def _same_model(
    encoder: DualEncoder, where: str, image_NE: torch.Tensor, weights: str | None, tell: Callable[[str], object]
) -> None:
    """Refuse vectors of another model. Raises IntermodalError."""
    if len(image_NE) and image_NE.shape[1] != encoder.config.embed_width:
        raise IntermodalError(
            f"{where} holds vectors of {image_NE.shape[1]} numbers, the model's have {encoder.config.embed_width}: "
            f"they are another model's"
        )
    if weights is None:
        tell(f"note: {where} does not say which model made its vectors; with another one than this the ranking has no meaning")
    elif weights != _fingerprint(encoder):
        raise IntermodalError(
            f"{where} holds vectors of another model, or of this one before it was trained on: a sentence says nothing about them; "
            f"search with that model, or run `embed` again"
        )


def _embedded(encoder: DualEncoder, where: str, rejects: list[Reject], batch: int = 64) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Keys and vectors, batch by batch; what cannot be embedded is added to `rejects`."""
    items = _items(encoder, where)
    rejects += items.problems
    for start in track(range(0, items.length, batch), "embedding", disable=items.length < 500, transient=True):
        keys, ready = [], []
        for index in range(start, min(start + batch, items.length)):
            try:
                key, value = items.item(index)
            except SampleError as error:
                rejects.append(Reject(f"{where}/{index}", str(error)))
                continue
            keys.append(key)
            ready.append(value)
        if ready:
            yield keys, items.encode(ready)
