"""Which reader reads a file: decord where it is known to be right, PyAV everywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cogcache.errors import VideoError
from cogcache.video.decord_reader import DecordReader, unfit_for_decord
from cogcache.video.probe import Probe, probe
from cogcache.video.protocol import VideoReader
from cogcache.video.pyav_reader import PyAVReader

__all__ = ["ReaderChoice", "open_video"]

ReaderChoice = Literal["auto", "decord", "pyav"]


def open_video(path: Path, reader: ReaderChoice) -> VideoReader:
    """Open a video with the reader that suits it, or with the one named.

    ``auto`` takes decord for H.264, HEVC and VP9 in MP4, MOV, MKV and WebM if decord counts and times the
    frames as the container does; PyAV otherwise, and then the reader's ``note`` says why.

    Raises:
        VideoError: with the reason, if the file cannot be used, or not by the reader named.
    """
    facts = probe(path)
    if reader == "pyav":
        return PyAVReader(path, facts)
    try:
        return _with_decord(path, facts)
    except VideoError as error:
        if reader == "decord":
            raise
        return PyAVReader(path, facts, note=error.message)


def _with_decord(path: Path, facts: Probe) -> VideoReader:
    reason = unfit_for_decord(facts)
    if reason:
        raise VideoError(reason, "Use --reader auto or --reader pyav.")
    return DecordReader(path, facts)
