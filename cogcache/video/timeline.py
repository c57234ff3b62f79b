"""When each frame of a video shows: from its packets where they can be trusted, else from decoding it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

from cogcache.video.container import damaged, decode_all, open_container, video_stream
from cogcache.video.protocol import Timestamps

__all__ = ["Timeline", "clock", "frame_timeline", "packet_timeline"]


@dataclass(frozen=True)
class Timeline:
    """Timestamps and durations of frames in display order, in ticks; ``None`` where the file has none."""

    pts: list[int | None]
    durations: list[int]
    keyframes: list[int] = field(default_factory=list)
    leading: bool = False


def packet_timeline(path: Path) -> Timeline | None:
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
    return Timeline(list(pts), [p.duration for p in shown], keyframes, _has_leading(packets))


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


def frame_timeline(path: Path) -> Timeline:
    """The timeline from decoding all frames, one at a time."""
    with open_container(path) as container:
        stream, _ = video_stream(container)
        frames = [(frame.pts, frame.duration or 0) for frame in decode_all(container, stream)]
    if not frames:
        raise damaged("no frame decodes")
    return Timeline([pts for pts, _ in frames], [duration for _, duration in frames])


def clock(timeline: Timeline, tick: Fraction, rate: Fraction) -> tuple[tuple[int, ...], Timestamps, float]:
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
