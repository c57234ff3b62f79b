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

import os
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

from cogcache.errors import VideoError
from cogcache.geometry import Size
from cogcache.precompute.video.orientation import Orientation, frame_orientation
from cogcache.precompute.video.protocol import Timestamps, VideoInfo
from cogcache.precompute.video.wholeness import missing_bytes

__all__ = ["Probe", "damaged", "decode_all", "open_container", "probe", "video_stream"]

_TRUSTED_CONTAINERS = {"mov", "mp4", "matroska", "webm"}
_TRUSTED_CODECS = {"h264", "hevc", "vp9", "av1"}
# Demuxers that may be opened; playlists and the like could lead to other files or to the network.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,mxf,gif,h264,hevc,ivf,nut,obu,live_flv"
)


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


@dataclass(frozen=True)
class _Timeline:
    """Timestamps and durations of frames in display order, in ticks; ``None`` where the file has none."""

    pts: list[int | None]
    durations: list[int]
    keyframes: list[int] = field(default_factory=list)
    leading: bool = False


def damaged(reason: str) -> VideoError:
    """The error for a file that opens but is not whole."""
    return VideoError(f"damaged: {reason}")


def open_container(path: Path, **options: str) -> Any:
    """Open with PyAV; local file only.

    Raises:
        VideoError: if it is not a video file.
    """
    allowed = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
    try:
        return av.open(os.fspath(path), options=allowed | options, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise VideoError(f"not a video: {error.strerror}") from None


def video_stream(container: Any) -> tuple[Any, int]:
    """The first video stream that is not a cover picture, and the number of such streams.

    Raises:
        VideoError: if there is none, or FFmpeg cannot decode it.
    """
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        raise VideoError("no video stream")
    if streams[0].codec_context is None:
        raise VideoError("no decoder for its video codec")
    streams[0].codec_context.thread_count = 1
    if streams[0].codec.canonical_name == "hevc":
        # Only this decoder hides most damage unless told to stop at it; the others flag the frame.
        streams[0].codec_context.options = {"err_detect": "explode"}
    return streams[0], len(streams)


def probe(path: Path) -> Probe:
    """Look at a video file without reading it into memory.

    Raises:
        VideoError: with the reason, if the file cannot be used.
    """
    _check_file(path)
    first = _first_look(path)
    by_packets = _packet_timeline(path) if first.trusted else None
    timeline = by_packets or _frame_timeline(path)
    pts, timestamps, duration_s = _clock(timeline, first.tick, first.rate)
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


def _packet_timeline(path: Path) -> _Timeline | None:
    """The timeline from packets, without decoding; ``None`` if their timestamps cannot be used."""
    packets, declared = _packets(path)
    if len(packets) < declared:
        # An edit list may hide frames at the end; they are still there if all packets come without it.
        found = len(_packets(path, ignore_editlist="1")[0])
        if found < declared:
            raise damaged(f"{declared} frames declared, {found} found")
    if any(packet.pts is None for packet in packets):
        return None
    start = next((packet.pts for packet in packets if packet.key), None)
    if start is None:
        return None
    # Frames shown before the first key frame lean on pictures that are not in the file.
    shown = sorted((p for p in packets if not p.hidden and p.pts >= start), key=lambda p: p.pts)
    pts = [packet.pts for packet in shown]
    if not pts or len(set(pts)) < len(pts):
        return None
    keyframes = [index for index, packet in enumerate(shown) if packet.key]
    return _Timeline(list(pts), [p.duration for p in shown], keyframes, _has_leading(packets))


@dataclass(frozen=True)
class _Packet:
    pts: Any
    duration: int
    key: bool
    hidden: bool


def _packets(path: Path, **options: str) -> tuple[list[_Packet], int]:
    """All packets in decoding order, and how many frames the container declares (0: it does not say)."""
    packets: list[_Packet] = []
    with open_container(path, **options) as container:
        stream, _ = video_stream(container)
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                if packet.is_corrupt:
                    raise damaged(f"packet {len(packets)} is cut short")
                if not any(bytes(memoryview(packet)[:16])):
                    raise damaged(f"packet {len(packets)} holds only zeros")
                duration = packet.duration or 0
                packets.append(_Packet(packet.pts, duration, packet.is_keyframe, packet.is_discard))
        except av.error.FFmpegError as error:
            raise damaged(f"unreadable after packet {len(packets)}: {error.strerror}") from None
        return packets, stream.frames


def _has_leading(packets: list[_Packet]) -> bool:
    """Whether pictures are decoded after a key frame but shown before it ("open GOP")."""
    key_pts = None
    for packet in packets:
        if packet.key:
            key_pts = packet.pts
        elif key_pts is not None and packet.pts < key_pts:
            return True
    return False


def decode_all(container: Any, stream: Any) -> Any:
    """Every frame in display order.

    Raises:
        VideoError: at the first one that does not decode or decodes with errors.
    """
    count = 0
    last_s = None

    def where() -> str:
        return f"after {count} frames" if last_s is None else f"after {last_s:.3f} s"

    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise damaged(f"the data {where()} is cut short")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise damaged(f"the picture {where()} decodes with errors")
                last_s = frame.time
                count += 1
                yield frame
    except av.error.FFmpegError as error:
        raise damaged(f"decoding fails {where()}: {error.strerror}") from None


def _frame_timeline(path: Path) -> _Timeline:
    """The timeline from decoding all frames, one at a time."""
    with open_container(path) as container:
        stream, _ = video_stream(container)
        frames = [(frame.pts, frame.duration or 0) for frame in decode_all(container, stream)]
    if not frames:
        raise damaged("no frame decodes")
    return _Timeline([pts for pts, _ in frames], [duration for _, duration in frames])


def _clock(timeline: _Timeline, tick: Fraction, rate: Fraction) -> tuple[tuple[int, ...], Timestamps, float]:
    """Ticks, seconds from 0, and the whole duration in seconds.

    Where timestamps are missing or do not increase, frames are spaced by the stream's frame rate.
    """
    ticks = [pts for pts in timeline.pts if pts is not None]
    count = len(timeline.pts)
    if len(ticks) < count or any(b <= a for a, b in pairwise(ticks)):
        return (), np.arange(count) / float(rate), count / float(rate)
    seconds = np.array([float((pts - ticks[0]) * tick) for pts in ticks])
    last = float(timeline.durations[-1] * tick)
    if last <= 0:
        last = float(np.median(np.diff(seconds))) if count > 1 else 1 / float(rate)
    return tuple(ticks), seconds, float(seconds[-1]) + last


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
