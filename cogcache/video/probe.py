"""What is in a video file, whether it is whole, and when each of its frames shows.

The rule for a usable file is that it *decodes to its end*. Decoding a whole film to take two seconds from it
would be wasteful, so where the container can be trusted (MP4/MOV and Matroska/WebM with H.264, HEVC, VP9
or AV1: one packet is one frame, timestamps are on packets) the end is checked without decoding:

- the container promises no bytes beyond the end of the file (:mod:`wholeness`);
- no packet is cut short, and there are as many as the index declares;
- no packet begins with a run of zeros, as in a download whose tail was never written;
- the first picture decodes here, and every picture from the key frame before the window to its last frame
  when it is read, without an error (VP9 and HEVC cannot tell all damage from picture content).

What this cannot see is a damaged picture beyond the window, which then is not used either. All other files
are decoded to the end, and their timestamps come from the frames. A program or transport stream that ends early
at a picture's end is a shorter video: nothing in it says that there was more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from cogcache.errors import VideoError
from cogcache.geometry import Size
from cogcache.video.container import damaged, open_container, video_stream
from cogcache.video.orientation import Orientation, frame_orientation
from cogcache.video.protocol import Timestamps, VideoInfo
from cogcache.video.timeline import clock, frame_timeline, packet_timeline
from cogcache.video.wholeness import missing_bytes

__all__ = ["Probe", "probe"]

_TRUSTED_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
_TRUSTED_CODECS = {"h264", "hevc", "vp9", "av1"}


@dataclass(frozen=True)
class Probe:
    """Result of :func:`probe`.

    Attributes:
        info: Facts of the file.
        timestamps: Seconds, from 0.
        pts: The container's own timestamp of each frame in stream ticks, or ``None`` where frames are to be
            counted from the start of the file instead.
        keyframes: Indices at which decoding can begin; empty where unknown.
        orientation: How the stored picture is turned upright.
        streams: Number of video streams, cover pictures not counted.
        leading: Whether pictures are decoded after a key frame but shown before it ("open GOP").
    """

    info: VideoInfo
    timestamps: Timestamps
    pts: tuple[int, ...] | None
    keyframes: tuple[int, ...]
    orientation: Orientation
    streams: int
    leading: bool


def probe(path: Path) -> Probe:
    """Look at a video file without reading it into memory.

    Raises:
        VideoError: with the reason, if the file cannot be used.
    """
    _check_file(path)
    first = _first_look(path)
    by_packets = packet_timeline(path) if first.trusted else None
    timeline = by_packets or frame_timeline(path)
    pts, timestamps, duration_s = clock(timeline, first.tick, first.rate)
    frames = len(timestamps)
    info = replace(first.info, frames=frames, duration_s=duration_s, fps=frames / duration_s)
    return Probe(
        info=info,
        timestamps=timestamps,
        pts=pts if by_packets else None,
        keyframes=tuple(timeline.keyframes),
        orientation=first.orientation,
        streams=first.streams,
        leading=timeline.leading,
    )


@dataclass(frozen=True)
class _FirstLook:
    """What stream header and first frame tell; nothing that needs the container to stay open."""

    info: VideoInfo
    orientation: Orientation
    tick: Fraction
    rate: Fraction
    streams: int
    trusted: bool


def _first_look(path: Path) -> _FirstLook:
    with open_container(path) as container:
        stream, streams = video_stream(container)
        frame = _first_frame(container, stream)
        orientation = frame_orientation(frame)
        return _FirstLook(
            info=_info(container, stream, frame, orientation),
            orientation=orientation,
            tick=stream.time_base,
            rate=stream.average_rate or stream.guessed_rate or Fraction(24),
            streams=streams,
            trusted=_is_trusted(container, stream),
        )


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise VideoError("the file does not exist" if not path.exists() else "not a file")
        if path.stat().st_size == 0:
            raise VideoError("empty file")
        missing = missing_bytes(path)
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from None
    if missing:
        raise damaged(f"the file is cut off, {missing} bytes are missing")


def _first_frame(container: Any, stream: Any) -> Any:
    try:
        frame = next(container.decode(stream), None)
    except av.error.FFmpegError as error:
        raise damaged(f"the first frame does not decode: {error.strerror}") from None
    if frame is None:
        raise damaged("no frame decodes")
    return frame


def _is_trusted(container: Any, stream: Any) -> bool:
    names = set(container.format.name.split(","))
    return bool(names & _TRUSTED_CONTAINERS) and stream.codec.canonical_name in _TRUSTED_CODECS


def _info(container: Any, stream: Any, frame: Any, orientation: Orientation) -> VideoInfo:
    stored = Size(frame.height, frame.width)
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    ratio = Fraction(ratio) if ratio else Fraction(1)
    shown = Size(stored.height, max(1, round(stored.width * ratio)))
    if orientation.transposed:
        shown = Size(shown.width, shown.height)
    return VideoInfo(
        codec=stream.codec.canonical_name,
        container=container.format.name,
        frames=0,
        fps=0.0,
        duration_s=0.0,
        stored=stored,
        rotation=orientation.degrees,
        mirrored=orientation.mirrored,
        sample_aspect_ratio=ratio,
        display=shown,
        tick_s=float(stream.time_base),
    )
