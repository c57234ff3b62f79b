"""Opening a video file with PyAV, and decoding it with every error told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from cogcache.errors import VideoError

__all__ = ["damaged", "decode_all", "open_container", "video_stream"]

# Demuxers that may be opened; playlists and the like could lead to other files or to the network.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,mxf,gif,h264,hevc,ivf,nut,obu,live_flv"
)


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


def decode_all(container: Any, stream: Any) -> Iterator[Any]:
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
