"""`intermodal data pack`: any source as one tar shard of small pictures, so that large files are decoded once and not every epoch."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image
from rich.progress import track

from ..errors import SampleError
from ..inputs.image import open_image
from .loader import ENDLESS
from .readers import SourceError, open_source
from .stream import StreamSource


def pack(spec: str, out: Path, side: int, count: int | None = None, *, progress: bool = True) -> tuple[int, int]:
    """Write a source to a WebDataset shard: a PNG whose longer side is at most `side`, and a JSON with its captions, a sample.

    What cannot be used is named in a file beside `out` that ends in `.rejects.jsonl`.

    Returns:
        How many samples were written, and how many could not be used.

    Raises:
        SourceError: the source is endless and `count` is not given, or nothing in it could be used.
    """
    source = open_source(spec, side=side)
    endless = isinstance(source, StreamSource) or len(source) >= ENDLESS
    if endless and count is None:
        raise SourceError(f"{spec} has no end: say how many samples with --count")
    length = count or 0 if isinstance(source, StreamSource) else min(count or len(source), len(source))
    written, rejects = 0, []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w") as archive:
        for index in track(range(length), "packing", transient=True, disable=not progress):
            try:
                sample = source.next() if isinstance(source, StreamSource) else source[index]
                picture = open_image(sample.image)
            except SampleError as error:
                rejects.append({"key": f"{source.name}/{index}", "reason": str(error)})
                continue
            picture.thumbnail((side, side), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            _add(archive, f"{index:08d}.png", buffer.getvalue())
            _add(
                archive, f"{index:08d}.json", json.dumps({"captions": sample.texts, "key": sample.key}, ensure_ascii=False).encode()
            )
            written += 1
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
