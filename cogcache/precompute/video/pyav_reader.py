"""The reader that reads everything FFmpeg does, through PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from av.video.reformatter import VideoReformatter

from cogcache.errors import VideoError
from cogcache.precompute.video.probe import Probe, damaged, decode_all, open_container, video_stream
from cogcache.precompute.video.protocol import Frame, StreamedReader

__all__ = ["PyAVReader"]


class _MissedError(Exception):
    """Decoding after a seek began behind the frame that was wanted."""


class PyAVReader(StreamedReader):
    """Reads by seeking to the key frame before the first wanted frame; see :class:`protocol.VideoReader`."""

    name = "pyav"

    def __init__(self, path: Path, probe: Probe, note: str = "") -> None:
        self.path = path
        self.note = note
        self.info = probe.info
        self.timestamps = probe.timestamps
        self._probe = probe
        self._reformatter = VideoReformatter()

    def stream(self, indices: Sequence[int]) -> Iterator[Frame]:
        done = 0
        start = self._keyframe_before(indices[0]) if indices else 0
        if start:
            try:
                for frame in self._from(start, indices):
                    yield frame
                    done += 1
                return
            except _MissedError:
                pass
        yield from self._from(0, indices[done:])

    def close(self) -> None:
        """Nothing is kept open between streams."""

    def _keyframe_before(self, index: int) -> int:
        return max((k for k in self._probe.keyframes if k <= index), default=0)

    def _from(self, start: int, indices: Sequence[int]) -> Iterator[Frame]:
        """The wanted frames, decoding from frame ``start``."""
        if not indices:
            return
        wanted = iter(indices)
        want = next(wanted)
        with open_container(self.path) as container:
            stream, _ = video_stream(container)
            if start and self._probe.pts:
                container.seek(self._probe.pts[start], stream=stream)
            for index, frame in self._numbered(decode_all(container, stream)):
                if index > want:
                    raise _MissedError if start else damaged(f"frame {want} does not decode")
                if index == want:
                    yield self._upright(frame)
                    following = next(wanted, None)
                    if following is None:
                        return
                    want = following
        if start:
            raise _MissedError
        raise damaged(f"frame {want} does not decode")

    def _numbered(self, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Frames with their index: by timestamp where packets have good ones, else by counting."""
        if self._probe.pts is None:
            yield from enumerate(frames)
            return
        index_of = {pts: index for index, pts in enumerate(self._probe.pts)}
        for frame in frames:
            if frame.pts in index_of:
                yield index_of[frame.pts], frame

    def _upright(self, frame: Any) -> Frame:
        stored = self.info.stored
        if (frame.height, frame.width) != (stored.height, stored.width):
            raise VideoError(f"the picture size changes from {stored} to {frame.height}x{frame.width}")
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        pixels: Any = rgb.to_ndarray()
        return self._probe.orientation.apply(pixels)
