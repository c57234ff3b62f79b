"""A second reader for the common formats, through decord."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogcache.errors import VideoError
from cogcache.video.probe import Probe
from cogcache.video.protocol import Frame, StreamedReader
from cogcache.video.pyav_reader import PyAVReader

__all__ = ["DecordReader", "unfit_for_decord"]

_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
_CODECS = {"h264", "hevc", "vp9"}
_CHUNK = 4  # frames asked for at once; twice as many are in memory
_TOLERANCE_S = 0.002  # decord's timestamps are float32: an hour has 0.25 ms resolution


def unfit_for_decord(probe: Probe) -> str:
    """Why decord should not read this file; empty if it may be tried."""
    if not _CONTAINERS & set(probe.info.container.split(",")):
        return f"decord is not trusted with the container {probe.info.container}"
    if probe.info.codec not in _CODECS:
        return f"decord is not trusted with the codec {probe.info.codec}"
    if probe.pts is None:
        return "the packets have no usable timestamps"
    if probe.info.mirrored:
        return "decord does not mirror pictures"
    if probe.leading:
        # Seen with 0.6.0 on x264 and x265 open-GOP streams: after a seek it returns frames up to three later.
        return "decord miscounts after a seek where key frames have leading pictures (open GOP)"
    if probe.streams > 1:
        return "there are several video streams"
    return ""


class DecordReader(StreamedReader):
    """Reads with its own decord reader, one per clip and thread; see :class:`protocol.VideoReader`.

    Raises:
        VideoError: if decord cannot open the file, or counts or times its frames otherwise than the
            container does.
    """

    name = "decord"

    def __init__(self, path: Path, probe: Probe) -> None:
        self.info = probe.info
        self._checker = PyAVReader(path, probe)
        self.timestamps = probe.timestamps
        self._reader = _open(path)
        reason = self._disagreement()
        if reason:
            raise VideoError(reason)

    def _disagreement(self) -> str:
        count = len(self._reader)
        if count != self.info.frames:
            return f"decord finds {count} frames, the container holds {self.info.frames}"
        times = np.asarray(self._reader.get_frame_timestamp(range(count)), dtype=np.float64)[:, 0]
        worst = float(np.abs(times - times[0] - self.timestamps).max())
        if not worst <= _TOLERANCE_S:
            return f"decord's timestamps are off by {worst:.3g} s"
        return ""

    def stream(self, indices: Sequence[int]) -> Iterator[Frame]:
        # decord hides decoding errors and returns what it has.
        self._checker.check(indices)
        for begin in range(0, len(indices), _CHUNK):
            chunk = list(indices[begin : begin + _CHUNK])
            frames = _guarded(lambda chunk=chunk: self._reader.get_batch(chunk).asnumpy())
            self._check_shape(frames)
            yield from frames

    def _check_shape(self, frames: Frame) -> None:
        height, width = self.info.stored.height, self.info.stored.width
        if self.info.rotation in (90, 270):
            height, width = width, height
        if frames.shape[1:] != (height, width, 3):
            raise VideoError(f"decord gives pictures of shape {frames.shape[1:]}, not {(height, width, 3)}")

    def close(self) -> None:
        self._reader = None


def _open(path: Path) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return _guarded(lambda: decord.VideoReader(os.fspath(path), num_threads=1))


def _guarded(action: Any) -> Any:
    """The result of ``action``; whatever decord raises becomes a :class:`VideoError` of one line."""
    import decord

    try:
        return action()
    except (decord.DECORDError, RuntimeError, IndexError, ValueError, OSError) as error:
        line = str(error).strip().partition("\n")[0]
        raise VideoError(f"decord fails: {line}") from None
