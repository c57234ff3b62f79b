"""Writing H.264 mp4 files that play everywhere, and reading them back."""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cogcache.errors import StorageError

__all__ = ["read_mp4", "write_mp4"]

_BT709, _LIMITED_RANGE = 1, 1  # code points of ITU-T H.273
_CRF = "17"  # close to visually lossless


def write_mp4(path: Path, frames: npt.NDArray[np.uint8], fps: float) -> None:
    """Write RGB ``frames`` [F, H, W, 3], H and W even, as H.264 in yuv420p, BT.709.

    The file appears complete or not at all; one that is there is replaced.

    Raises:
        StorageError: if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(part, frames, fps)
        part.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_mp4(path: Path) -> tuple[npt.NDArray[np.uint8], float]:
    """RGB frames [F, H, W, 3] and frames per second of a file that :func:`write_mp4` wrote."""
    import av

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames), float(rate or 1)


def _encode(path: Path, frames: npt.NDArray[np.uint8], fps: float) -> None:
    import av

    height, width = frames.shape[1:3]
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # With its macroblock tree x264 does not always give the same bytes for equal (small) pictures.
        stream.options = {"crf": _CRF, "preset": "medium", "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
