"""Videos by path: decoding with PyAV, and which frames are read.

Sources of the two rules: `qwen_vl_utils/vision_process.py` (`smart_nframes`, evenly spaced indices) and Hugging Face
`video_processing_qwen3_vl.py:139-185`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .media import Clip, MediaError, local_path

_LOCAL = {"protocol_whitelist": "file"}  # a playlist by its content (ffconcat, HLS) may name other files, but no address


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are shown to a model. Give `frames` or `fps`; the count is a whole number of `pair` frames."""

    fps: float = 2.0
    frames: int | None = None
    """This many (rounded up to whole pairs), or all of a shorter video, whatever its length in seconds; None goes by `fps`."""
    least: int = 4
    """Of a count by `fps`, rounded up to whole pairs."""
    most: int = 768
    pair: int = 2
    """Frames that the model reads together."""

    def indices(self, total: int, rate: float) -> list[int]:
        """Numbers of the frames to read from a video of `total` frames at `rate` a second, evenly spaced, first and last included.

        Raises:
            MediaError: the video is shorter than one pair of frames, or a setting is not above 0.
        """
        if not (math.isfinite(self.fps) and self.fps > 0) or (self.frames is not None and self.frames < 1):
            raise MediaError(f"a video is sampled by a positive fps or number of frames, not fps={self.fps}, frames={self.frames}")
        if total < self.pair:
            raise MediaError(f"the video has {total} frame{'s' * (total != 1)}; at least {self.pair} are needed")
        if self.frames is not None:
            count = -(-self.frames // self.pair) * self.pair
        else:
            count = max(int(total / rate * self.fps) // self.pair * self.pair, -(-self.least // self.pair) * self.pair)
        count = min(count, min(self.most, total) // self.pair * self.pair)
        return np.linspace(0, total - 1, max(count, self.pair)).round().astype(int).tolist()


def sampling_of(usual: Sampling | None, fps: float | None, frames: int | None) -> Sampling:
    """The usual way with another rate or number of frames, where one is given; a number goes before a rate.

    Raises:
        MediaError: they are no numbers, or the number of frames is none.
    """
    usual = usual or Sampling()
    try:
        if frames is not None:
            return replace(usual, frames=int(frames))
        return usual if fps is None else replace(usual, fps=float(fps), frames=None)
    except (TypeError, ValueError, OverflowError):
        raise MediaError(f"a video's fps and nframes are numbers, and not {fps!r:.80} and {frames!r:.80}") from None


def counted(usual: Sampling, least: Any, most: Any) -> Sampling:
    """The usual way with other bounds of a count by `fps`, where they are given; a number of frames goes before them.

    Raises:
        MediaError: they are no numbers of frames.
    """
    given = {name: bound for name, bound in (("least", least), ("most", most)) if bound is not None}
    for bound in given.values():
        if isinstance(bound, bool) or not isinstance(bound, Real) or not (math.isfinite(bound) and float(bound) >= 1):
            raise MediaError(f"a video's min_frames and max_frames are numbers of frames, at least 1, and not {bound!r:.80}")
    if given.get("least", 1) > given.get("most", math.inf):
        raise MediaError(f"min_frames {least} of a video is more than its max_frames {most}")
    return usual if usual.frames is not None else replace(usual, **{name: int(bound) for name, bound in given.items()})


@dataclass(frozen=True)
class Section:
    """The part of a video that is read, in seconds from its first frame, both ends included; None is the video's own end."""

    start: float | None = None
    end: float | None = None

    def __post_init__(self):
        for at in (self.start, self.end):
            if at is not None and (isinstance(at, bool) or not isinstance(at, Real) or not math.isfinite(at)):
                raise MediaError(f"a video's video_start and video_end are seconds, and not {at!r:.80}")

    def inside(self, seconds: Sequence[float]) -> list[int]:
        """Numbers of the frames in it, of frames shown at these seconds."""
        start, end = self.start or 0.0, math.inf if self.end is None else self.end
        return [index for index, at in enumerate(seconds) if start - 1e-6 <= at <= end + 1e-6]  # 0.1 + 0.2 is 0.3

    def __str__(self) -> str:
        return "" if self == Section() else f" from {self.start or 0} s to {'its end' if self.end is None else f'{self.end} s'}"


@contextmanager
def _opened(video: str | Path | bytes) -> Iterator[tuple[BinaryIO, str]]:
    """A file to read frames from, and its name for errors. FFmpeg is given no name to open: it would take `http:/host/a.mp4`,
    `concat:a|b` and the like for addresses of its own protocols.

    Raises:
        MediaError: an address on the network, or a file that cannot be read as a video while this is open.
    """
    import av

    name = "the data URI" if isinstance(video, bytes) else str(local_path(video, "videos"))
    try:
        with io.BytesIO(video) if isinstance(video, bytes) else open(name, "rb") as file:
            yield file, name
    except (av.FFmpegError, OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise MediaError(f"{name} is not a readable video: {error}") from error


def decode(video: str | Path | bytes, sampling: Sampling, section: Section | None = None) -> Clip:
    """Read the sampled frames of a video file, given by its path or as its bytes.

    The times are those written in the file, so that a variable frame rate is told as it is; of a section, too, they count from the first
    frame of the file.

    Raises:
        MediaError: an address on the network; the file cannot be read, holds no video, too few frames, or ends before its index says.
    """
    import av

    with _opened(video) as (file, name):
        with av.open(file, "r", options=_LOCAL) as container:
            if not container.streams.video:
                raise MediaError(f"{name} holds no video")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            if rate <= 0:
                raise MediaError(f"{name} does not say its frame rate")
            times = [float(frame.time or 0.0) for frame in container.decode(stream)]
        seconds = [time - times[0] for time in times]
        section = section or Section()
        inside = section.inside(seconds)
        if len(inside) < sampling.pair:
            raise MediaError(_too_short(f"{name}{section}", len(inside), sampling.pair))
        wanted = [inside[index] for index in sampling.indices(len(inside), rate)]
        keep, frames = set(wanted), {}
        file.seek(0)
        with av.open(file, "r", options=_LOCAL) as container:
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                if index in keep:
                    # a phone's clip is stored as the sensor lay; players turn it by the angle that the file tells
                    frames[index] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        pixels = np.stack([frames[index] for index in wanted])  # a ValueError where the size changes on the way
    return Clip(pixels, tuple(seconds[index] for index in wanted), len(wanted) / len(inside) * rate)


def _too_short(name: str, frames: int, pair: int) -> str:
    has = f"{name} has {frames} frame{'s' * (frames != 1)}; at least {pair} are needed of a video by its path"
    return f'{has}. One picture as a video is a list: {{"type": "video", "video": [picture]}}' if frames == 1 else has
