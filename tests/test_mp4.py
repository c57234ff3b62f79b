"""The mp4 file: right frames, right colours, whole or absent."""

from __future__ import annotations

import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cogcache.errors import StorageError
from cogcache.mp4 import write_mp4


def colours() -> np.ndarray:
    """Nine frames of four flat patches in strong colours, changing from frame to frame."""
    frames = np.zeros((9, 64, 96, 3), np.uint8)
    for n in range(9):
        frames[n, :32, :48] = (255, 25 * n, 0)
        frames[n, :32, 48:] = (0, 255, 25 * n)
        frames[n, 32:, :48] = (25 * n, 0, 255)
        frames[n, 32:, 48:] = 28 * n
    return frames


@pytest.mark.parametrize(
    ("fps", "rate"), [(8.0, 8), (12.5, Fraction(25, 2)), (29.97002997, Fraction(30000, 1001))]
)
def test_frames_colours_and_rate_survive(tmp_path: Path, fps: float, rate: Fraction) -> None:
    frames = colours()
    write_mp4(tmp_path / "a.mp4", frames, fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        read = [
            frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
            for frame in container.decode(stream)
        ]
    assert (stream.average_rate, context.pix_fmt) == (rate, "yuv420p")
    assert [
        int(tag)
        for tag in (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
    ] == [1, 1, 1, 1]
    inside = np.s_[:, 8:24, 8:40]  # away from edges, where chroma is shared between pixels
    for part in (inside, np.s_[:, 40:56, 56:88]):
        assert np.abs(np.stack(read)[part].astype(int) - frames[part]).max() <= 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the file size stands in for a full disk."""
    write_mp4(tmp_path / "a.mp4", colours(), 8.0)
    before = (tmp_path / "a.mp4").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            write_mp4(tmp_path / "a.mp4", colours(), 8.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        write_mp4(tmp_path / "file" / "a.mp4", colours(), 8.0)
