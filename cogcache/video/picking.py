"""Which frames of a video make a clip. Pure arithmetic on timestamps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogcache.errors import TooShortError
from cogcache.video.protocol import Timestamps

__all__ = ["Picked", "Window", "frames_available", "pick"]

_EPSILON_S = 1e-6
_MAX_TOLERANCE_S = 1e-3


@dataclass(frozen=True)
class Window:
    """Where in a video a clip is taken.

    ``part`` is the window number ``index`` of ``count``, spread evenly: the first begins at the start of the
    video, the last ends at its end. Windows overlap where the video is shorter than all of them
    together, and coincide where it is no longer than one.
    """

    kind: Literal["start", "centre", "part"] = "start"
    index: int = 0
    count: int = 1

    def share(self) -> float:
        """How much of the video's spare length lies before the window, 0 to 1."""
        if self.kind == "centre":
            return 0.5
        if self.kind == "start" or self.count <= 1:
            return 0.0
        return self.index / (self.count - 1)

    def __str__(self) -> str:
        return f"part {self.index + 1} of {self.count}" if self.kind == "part" else self.kind


@dataclass(frozen=True)
class Picked:
    """A clip as frame indices, non-decreasing.

    ``padded`` counts frames at the end that repeat the last one because the video is too short;
    ``repeated`` the other frames equal to the one before, because the source is slower than the clip.
    """

    indices: tuple[int, ...]
    padded: int
    repeated: int


def frames_available(frames: int, duration_s: float, tick_s: float, fps: float | None) -> int:
    """Frames that a whole video gives: its own ``frames`` (``fps`` None), or the points k / fps that lie within it."""
    if fps is None:
        return frames
    return max(1, math.ceil((duration_s - _tolerance_s(tick_s)) * fps))


def _tolerance_s(tick_s: float) -> float:
    return min(tick_s, _MAX_TOLERANCE_S) + _EPSILON_S


def pick(
    timestamps: Timestamps,
    duration_s: float,
    tick_s: float,
    frames: int,
    fps: float | None,
    window: Window,
    short: Literal["fail", "pad"],
) -> Picked:
    """Pick ``frames`` frames at ``fps``, or consecutive ones if ``fps`` is None.

    At ``fps``, the frame at time t is the one a player would show: the last with timestamp <= t. Timestamps
    are rounded to the container's tick, the first one too, so one may come up to a tick late: t is
    compared with a tolerance of one tick, at most 1 ms. Where the source is slower, frames repeat.

    Raises:
        TooShortError: if the video holds fewer frames and ``short`` is ``fail``, or holds a single picture
            where more are asked for.
    """
    available = frames_available(len(timestamps), duration_s, tick_s, fps)
    if frames > 1 and len(timestamps) == 1:
        raise TooShortError(f"1 < {frames} frames")
    if available < frames and short == "fail":
        raise TooShortError(_reason(available, frames, fps, duration_s))
    if fps is None:
        begin = math.floor(max(0, available - frames) * window.share() + 0.5)
        wanted = np.arange(begin, begin + frames)
        indices = np.minimum(wanted, available - 1)
    else:
        begin_s = max(0.0, duration_s - frames / fps) * window.share()
        times = begin_s + np.arange(frames) / fps + _tolerance_s(tick_s)
        indices = np.searchsorted(timestamps, times, side="right") - 1
    padded = max(0, frames - available)
    own = indices[: frames - padded]
    return Picked(tuple(indices.tolist()), padded, int((np.diff(own) == 0).sum()))


def _reason(available: int, frames: int, fps: float | None, duration_s: float) -> str:
    if fps is None:
        return f"{available} < {frames} frames"
    return f"{available} < {frames} frames: {duration_s:.2f} s at {fps:g} fps"
