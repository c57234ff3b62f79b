"""Which reader reads a file: PyAV, or decord where it is asked for and known to be right."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cogcache.errors import VideoError
from cogcache.video.decord_reader import DecordReader, unfit_for_decord
from cogcache.video.probe import probe
from cogcache.video.protocol import VideoReader
from cogcache.video.pyav_reader import PyAVReader

__all__ = ["ReaderChoice", "open_video"]

ReaderChoice = Literal["auto", "decord", "pyav"]


def open_video(path: Path, reader: ReaderChoice) -> VideoReader:
    """Open a video with the reader that suits it, or with the one named.

    ``auto`` takes PyAV. decord hides decoding errors, so PyAV must decode every picture all the same before it is
    trusted: both together took twice the time of PyAV alone on 1080p H.264, for the same pixels.

    Raises:
        VideoError: with the reason, if the file cannot be used, or not by decord where that was named.
    """
    facts = probe(path)
    if reader != "decord":
        return PyAVReader(path, facts)
    reason = unfit_for_decord(facts)
    if reason:
        raise VideoError(reason, "Use --reader auto or --reader pyav.")
    return DecordReader(path, facts)
