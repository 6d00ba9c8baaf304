"""Videos by path: decoding with PyAV, and which frames are read.

Sources of the two rules: `qwen_vl_utils/vision_process.py` (`smart_nframes`, evenly spaced indices) and Hugging Face
`video_processing_qwen3_vl.py:139-185`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .media import Clip, MediaError, local_path


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are shown to a model. Give `frames` or `fps`; the count is a whole number of `pair` frames."""

    fps: float = 2.0
    frames: int | None = None
    """This many (rounded up to whole pairs), or all of a shorter video, whatever its length in seconds; None goes by `fps`."""
    least: int = 4
    """Of a count by `fps`."""
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
            raise MediaError(f"the video has {total} frames; at least {self.pair} are needed")
        if self.frames is not None:
            count = -(-self.frames // self.pair) * self.pair
        else:
            count = max(int(total / rate * self.fps) // self.pair * self.pair, self.least)
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
        raise MediaError(f"a video's fps and nframes are numbers, and not {fps!r} and {frames!r}") from None


def decode(path: str | Path, sampling: Sampling) -> Clip:
    """Read the sampled frames of a video file.

    The times are those written in the file, so that a variable frame rate is told as it is.

    Raises:
        MediaError: an address on the network; the file cannot be read, holds no video, or ends before its index says.
    """
    import av

    file = local_path(path, "videos")
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise MediaError(f"{file} holds no video")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            if rate <= 0:
                raise MediaError(f"{file} does not say its frame rate")
            times = [float(frame.time or 0.0) for frame in container.decode(stream)]
        wanted = sampling.indices(len(times), rate)
        keep, frames = set(wanted), {}
        with av.open(str(file)) as container:
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                if index in keep:
                    # a phone's clip is stored as the sensor lay; players turn it by the angle that the file tells
                    frames[index] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{file} is not a readable video: {error}") from error
    first = times[0]
    pixels = np.stack([frames[index] for index in wanted])
    seconds = tuple(times[index] - first for index in wanted)
    return Clip(pixels, seconds, len(wanted) / len(times) * rate)
