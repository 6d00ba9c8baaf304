"""Videos by path: decoding with PyAV, and which frames are read.

Sources of the two rules: `qwen_vl_utils/vision_process.py` (`smart_nframes`, evenly spaced indices) and Hugging Face
`video_processing_qwen3_vl.py:139-185`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .media import Clip, MediaError


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are shown to a model. Give `frames` or `fps`; the count is a whole number of frame pairs."""

    fps: float = 2.0
    frames: int | None = None
    """Exactly this many, whatever the length; None goes by `fps`."""
    least: int = 4
    most: int = 768
    pair: int = 2

    def indices(self, total: int, rate: float) -> list[int]:
        """Numbers of the frames to read from a video of `total` frames at `rate` a second, evenly spaced, first and last included.

        Raises:
            MediaError: the video is shorter than one pair of frames.
        """
        if total < self.pair:
            raise MediaError(f"the video has {total} frames; at least {self.pair} are needed")
        wanted = self.frames if self.frames is not None else total / rate * self.fps
        count = round(wanted / self.pair) * self.pair if self.frames is not None else int(wanted) // self.pair * self.pair
        most = min(self.most, total) // self.pair * self.pair
        count = min(max(count, self.least), most)
        return np.linspace(0, total - 1, max(count, self.pair)).round().astype(int).tolist()


def decode(path: str | Path, sampling: Sampling) -> Clip:
    """Read the sampled frames of a video file.

    The times are those written in the file, so that a variable frame rate is told as it is.

    Raises:
        MediaError: the file cannot be read, holds no video, or ends before its index says.
    """
    import av

    file = Path(str(path).removeprefix("file://")).expanduser()
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
                    frames[index] = frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{file} is not a readable video: {error}") from error
    first = times[0]
    pixels = np.stack([frames[index] for index in wanted])
    seconds = tuple(times[index] - first for index in wanted)
    return Clip(pixels, seconds, len(wanted) / len(times) * rate)
