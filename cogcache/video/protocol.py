"""What a video reader is: the seam between file formats and everything after them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cogcache.geometry import Size

__all__ = ["Frame", "Timestamps", "VideoInfo", "VideoReader"]

Frame = npt.NDArray[np.uint8]
"""One picture, uint8 RGB [H, W, 3], upright, stored pixels (not yet square)."""

Timestamps = npt.NDArray[np.float64]
"""When each frame begins to show, in seconds, strictly increasing, the first at 0."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts of one video file.

    Attributes:
        codec: FFmpeg's codec name, e.g. ``h264``.
        container: FFmpeg's demuxer name, e.g. ``mov,mp4,m4a,3gp,3g2,mj2``.
        frames: Frames that the file holds.
        fps: Mean frame rate: frames / duration.
        duration_s: From the start of the first frame to the end of the last, its own duration included.
        stored: Size of the coded picture, before rotation.
        rotation: Degrees counter-clockwise that turn the stored picture upright: 0, 90, 180 or 270.
        mirrored: Whether the picture is also mirrored for display.
        sample_aspect_ratio: Width / height of a stored pixel.
        display: Size in square pixels after rotation and sample aspect ratio, rounded.
        tick_s: Resolution of the container's timestamps.
    """

    codec: str
    container: str
    frames: int
    fps: float
    duration_s: float
    stored: Size
    rotation: int
    mirrored: bool
    sample_aspect_ratio: Fraction
    display: Size
    tick_s: float


class VideoReader(Protocol):
    """Frames of one open video, by index into ``timestamps``. Used by one thread, then closed."""

    name: str
    info: VideoInfo
    timestamps: Timestamps

    def stream(self, indices: Sequence[int]) -> Iterator[Frame]:
        """The frames at strictly increasing ``indices``, one at a time; holds few in memory.

        Raises:
            VideoError: if one does not decode.
        """
        ...

    def read(self, indices: Sequence[int]) -> Frame:
        """The frames at ``indices``, in any order and with repeats, as uint8 [F, H, W, 3].

        Raises:
            VideoError: if one does not decode.
        """
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...

    def __enter__(self) -> VideoReader: ...

    def __exit__(self, *exception: Any) -> None: ...


class StreamedReader(ABC):
    """What readers share: ``read`` and the context manager on top of ``stream`` and ``close``."""

    @abstractmethod
    def stream(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See :class:`VideoReader`."""

    @abstractmethod
    def close(self) -> None:
        """See :class:`VideoReader`."""

    def read(self, indices: Sequence[int]) -> Frame:
        unique, back = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        frames: Frame = np.stack(list(self.stream(unique.tolist())))[back]
        return frames

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
