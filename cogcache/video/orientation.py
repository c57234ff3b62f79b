"""Turning a stored picture upright, from the display matrix that cameras write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cogcache.video.protocol import Frame

__all__ = ["Orientation", "frame_orientation"]


@dataclass(frozen=True)
class Orientation:
    """First transpose, then flip rows and columns."""

    transposed: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether writing in the picture would be reversed by a mere turn."""
        return self.transposed ^ self.flip_rows ^ self.flip_columns

    @property
    def degrees(self) -> int:
        """Counter-clockwise turn: 0, 90, 180 or 270; of the mirrored picture, if it is mirrored."""
        if self.transposed:
            return 90 if self.flip_rows else 270
        return 180 if self.flip_rows else 0

    def apply(self, frame: Frame) -> Frame:
        """The upright picture [H', W', 3] of the stored one [H, W, 3]; a view."""
        if self.transposed:
            frame = frame.transpose(1, 0, 2)
        return frame[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def frame_orientation(frame: Any) -> Orientation:
    """The orientation that a PyAV frame's display matrix asks for, to the nearest quarter turn.

    The matrix sends (x, y) to (a x + c y, b x + d y), stored as a, b, u, c, d, v, x, y, w
    (ISO/IEC 14496-12, track header).
    """
    for data in frame.side_data.keys():  # noqa: SIM118  iterating the container itself gives nothing
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = (int(n) for n in np.frombuffer(data, dtype="<i4")[:5])
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
            return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation()
