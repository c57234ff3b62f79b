"""The reader that reads everything FFmpeg does, through PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from av.video.reformatter import VideoReformatter

from cogcache.errors import VideoError
from cogcache.video.container import damaged, decode_all, open_container, video_stream
from cogcache.video.probe import Probe
from cogcache.video.protocol import Frame, StreamedReader

__all__ = ["PyAVReader"]


class _MissedError(Exception):
    """Decoding after a seek began behind the frame that was wanted."""


class PyAVReader(StreamedReader):
    """Reads by seeking to the key frame before the first wanted frame; see :class:`protocol.VideoReader`."""

    name = "pyav"

    def __init__(self, path: Path, probe: Probe) -> None:
        self.path = path
        self.info = probe.info
        self.timestamps = probe.timestamps
        self._probe = probe
        self._reformatter = VideoReformatter()

    def stream(self, indices: Sequence[int]) -> Iterator[Frame]:
        for frame in self._decoded(indices):
            yield self._upright(frame)

    def check(self, indices: Sequence[int]) -> None:
        """Decode all that is needed to show the frames at increasing ``indices``, and look at none.

        Raises:
            VideoError: if something on the way does not decode.
        """
        for _ in self._decoded(indices):
            pass

    def close(self) -> None:
        """Nothing is kept open between streams."""

    def _decoded(self, indices: Sequence[int]) -> Iterator[Any]:
        """PyAV's frames at ``indices``, beginning at the key frame before them if that works."""
        done = 0
        start = max((k for k in self._probe.keyframes if k <= indices[0]), default=0) if indices else 0
        if start:
            try:
                for frame in self._decoded_from(start, indices):
                    yield frame
                    done += 1
                return
            except _MissedError:
                pass
        yield from self._decoded_from(0, indices[done:])

    def _decoded_from(self, start: int, indices: Sequence[int]) -> Iterator[Any]:
        """The wanted frames, decoding from frame ``start`` on."""
        wanted = iter(indices)
        want = next(wanted, None)
        with open_container(self.path) as container:
            stream, _ = video_stream(container)
            if start and self._probe.pts:
                container.seek(self._probe.pts[start], stream=stream)
            for index, frame in self._numbered(decode_all(container, stream)):
                if want is None or index > want:
                    break
                if index == want:
                    yield frame
                    want = next(wanted, None)
                    if want is None:
                        return
        if want is not None:
            raise _MissedError if start else damaged(f"frame {want} does not decode")

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
