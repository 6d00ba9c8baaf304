"""`intermodal data pack`: any source as one tar shard of small pictures, so that large files are decoded once and not every epoch."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from rich.progress import track

from .loader import ENDLESS
from .readers import SourceError, open_source
from .source import Reject
from .stream import StreamSource, first_samples


def pack(
    spec: str, out: Path, side: int, count: int | None = None, *, allow_urls: bool = False, progress: bool = True
) -> tuple[int, int]:
    """Write a source to a WebDataset shard: a PNG whose longer side is at most `side`, and a JSON with its captions, a sample.

    What cannot be used is named in a file beside `out` that ends in `.rejects.jsonl`, shards that are cut short among it. The shard is
    written under another name and moved to `out` once it is whole: an interrupted call leaves an `out` that was there as it is.

    Args:
        count: of how many samples; None takes all, of a stream one pass.
        allow_urls: fetch pictures that a table names by http(s) address.

    Returns:
        How many samples were written, and how many samples or shards could not be used.

    Raises:
        SourceError: the source is endless and `count` is not given, `out` is one of its files, or nothing in it could be used.
    """
    source = open_source(spec, side=side, allow_urls=allow_urls)
    same = (file for file in getattr(source, "files", []) if file.suffix == out.suffix and file.exists())
    if out.exists() and any(out.samefile(file) for file in same):
        raise SourceError(f"{out} is read as {spec} and would be replaced by its small pictures: give another --out")
    stream = isinstance(source, StreamSource)
    if count is None and not stream and len(source) >= ENDLESS:
        raise SourceError(f"{spec} has no end: say how many samples with --count")
    total = count if stream else min(count or len(source), len(source))
    written, rejects = 0, [asdict(Reject(file, reason)) for file, reason in getattr(source, "problems", [])]
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    try:
        with tarfile.open(part, "w") as archive:
            samples = track(first_samples(source, count), "packing", total, transient=True, disable=not progress)
            for index, sample in enumerate(samples):
                if isinstance(sample, Reject):
                    rejects.append(asdict(sample))
                    continue
                small, buffer = sample.image.copy(), io.BytesIO()
                small.thumbnail((side, side), Image.Resampling.BICUBIC)
                small.save(buffer, "PNG")
                _add(archive, f"{index:08d}.png", buffer.getvalue())
                captions = json.dumps({"captions": sample.texts, "key": sample.key}, ensure_ascii=False)
                _add(archive, f"{index:08d}.json", captions.encode())
                written += 1
        if written:
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    if rejects:
        out.with_suffix(".rejects.jsonl").write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    if not written:
        raise SourceError(
            f"nothing in {spec} could be used; the last reason: {rejects[-1]['reason'] if rejects else 'it is empty'}"
        )
    return written, len(rejects)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
