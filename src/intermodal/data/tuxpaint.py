"""Tux Paint's stamps: about 950 captioned pictures in 77 languages, from Debian's package. GPL-2 and others: fetched, never shipped."""

from __future__ import annotations

import hashlib
import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import SampleError
from ..files import cache_folder
from .source import Sample

PACKAGE = "tuxpaint-stamps-default"


def fetch(target: Path | None = None) -> Path:
    """Download the Debian package with apt and unpack its stamps; returns the folder.

    Raises:
        SourceError: there is no apt here, or it cannot reach the package.
    """
    from .readers import SourceError

    target = target or cache_folder() / "tuxpaint"
    if (target / "stamps").is_dir():
        return target
    if shutil.which("apt-get") is None:
        raise SourceError(f"no apt-get here: download {PACKAGE}'s .deb from Debian by hand and use tuxpaint:PATH_TO_DEB")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
        packages = list(Path(folder).glob("*.deb"))
        if not packages:
            raise SourceError(f"apt-get download {PACKAGE} failed (run `apt-get update` first?): {done.stderr.strip()[-300:]}")
        unpack(packages[0], target)
    return target


def unpack(package: Path, target: Path) -> None:
    """Unpack the stamps of a .deb (an `ar` archive with a tar inside) into `target/stamps`.

    Raises:
        SourceError: the file is not a .deb, or is cut short.
    """
    from .readers import SourceError

    try:
        data = _ar_member(package.read_bytes(), b"data.tar")
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data)), mode="r:") as archive:
            for member in archive:
                _, found, inside = member.name.partition("/tuxpaint/stamps/")
                if not found or not member.isfile() or ".." in inside:
                    continue
                file = target / "stamps" / inside
                file.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                file.write_bytes(content.read())
    except (ValueError, lzma.LZMAError, tarfile.TarError, OSError) as error:
        raise SourceError(f"{package} is not a readable Debian package: {error}") from error


def _ar_member(data: bytes, prefix: bytes) -> bytes:
    """One member of an `ar` archive: a magic line, then 60-byte headers with a decimal size, data padded to even length."""
    if data[:8] != b"!<arch>\n":
        raise ValueError("no ar magic")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].strip(), int(data[at + 48 : at + 58])
        if name.startswith(prefix):
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"no {prefix.decode()} in it")


@dataclass(frozen=True)
class TuxPaintConfig:
    languages: str = "en"
    """Codes, with commas between, of the languages whose captions a sample has; a stamp without any of them is unusable."""
    split: Literal["all", "train", "test"] = "all"
    """test: one stamp in ten, by the hash of its name; train: the others."""


class TuxPaint:
    """The stamps as a source: captions in the languages asked for, `meta["captions"]` holds all by code.

    `meta["sounds"]` holds the paths of the spoken captions by language code.
    """

    def __init__(self, where: str = "", config: TuxPaintConfig | None = None):
        from .readers import SourceError

        self.config = config = config or TuxPaintConfig()
        folder = Path(where).expanduser() if where else cache_folder() / "tuxpaint"
        if folder.suffix == ".deb":
            package, folder = folder, cache_folder() / "tuxpaint"
            if not (folder / "stamps").is_dir():
                unpack(package, folder)
        if not folder.is_dir():
            raise SourceError(f"{folder} does not exist: run `intermodal data fetch tuxpaint`, or give tuxpaint:FOLDER")
        self.name, self.folder = "tuxpaint", folder
        self.problems: list[tuple[str, str]] = []
        captioned = sorted(folder.rglob("*.txt"))
        drawn = [next((t.with_suffix(s) for s in (".png", ".svg") if t.with_suffix(s).exists()), None) for t in captioned]
        self.files = [file for file in drawn if file is not None]
        if not self.files:
            raise SourceError(f"{folder} holds no stamps (a .png or .svg beside a .txt)")
        if config.split != "all":
            self.name += f"-{config.split}"
            self.files = [file for file in self.files if held_out(file.stem) == (config.split == "test")]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        captions = read_captions(file.with_suffix(".txt"))
        wanted = self.config.languages.split(",")
        texts = [captions[code] for code in wanted if code in captions]
        if not texts:
            raise SampleError(f"{file.name}: no caption in {' or '.join(wanted)} in its .txt")
        english = [file.with_suffix(suffix) for suffix in (".ogg", ".wav") if file.with_suffix(suffix).exists()]
        sounds = {"en": str(english[0])} if english else {}
        for spoken in file.parent.glob(f"{file.stem}_desc_*.ogg"):
            sounds[spoken.stem.rpartition("_desc_")[2]] = str(spoken)
        key = f"{self.name}/{file.relative_to(self.folder).as_posix()}"
        picture = rendered(file) if file.suffix == ".svg" else str(file)
        return Sample(key, picture, texts, {"captions": captions, "sounds": sounds})


def held_out(name: str) -> bool:
    """Whether a stamp belongs to the test side: one in ten, for ever."""
    return hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % 10 == 0


def rendered(file: Path, side: int = 256) -> bytes:
    """An SVG stamp as PNG bytes.

    Raises:
        SampleError: `resvg-py` is not installed, or the drawing is broken.
    """
    try:
        import resvg_py
    except ImportError:
        raise SampleError(f"{file.name} is an SVG: `pip install 'intermodal[svg]'` to draw it") from None
    try:
        return bytes(resvg_py.svg_to_bytes(svg_string=file.read_text(encoding="utf-8", errors="replace"), width=side))
    except ValueError as error:
        raise SampleError(f"{file.name} is not a drawable SVG: {error}") from error


def read_captions(file: Path) -> dict[str, str]:
    """A stamp's `.txt`: the first line is English, the others are `code.utf8=caption`."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    captions = {"en": lines[0].strip()} if lines and lines[0].strip() else {}
    for line in lines[1:]:
        code, equals, text = line.partition(".utf8=")
        if equals and text.strip():
            captions[code.strip()] = text.strip()
    return captions
