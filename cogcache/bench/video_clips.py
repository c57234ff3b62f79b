"""Videos such as people have them, 1080p in H.264, made on the spot."""

from __future__ import annotations

import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cogcache.errors import ConfigError
from cogcache.geometry import Size

__all__ = ["FULL_HD", "make_videos"]

FULL_HD = Size(1080, 1920)
_DISTINCT = 6
_FPS = 30
_GRAIN = 3.2  # brings 1080p to about 8 Mbit/s, as of a good camera

Plane = npt.NDArray[np.uint8]


def make_videos(folder: Path, count: int, size: Size = FULL_HD, frames: int = 200) -> Path:
    """A data root of ``count`` videos at 30 frames/s with a caption each, no two of equal content.

    A few are encoded; the others are copies of them with a box behind the end that players skip.

    Raises:
        ConfigError: if this build of PyAV cannot write H.264.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / f"{number:04d}.mp4" for number in range(count)]
    with ThreadPoolExecutor(2) as pool:  # x264 has threads of its own
        list(
            pool.map(lambda number: _write(made[number], number, size, frames), range(min(count, _DISTINCT)))
        )
    for number, path in enumerate(made):
        if number >= _DISTINCT:
            shutil.copyfile(made[number % _DISTINCT], path)
            with path.open("ab") as file:
                file.write(struct.pack(">I4sQ", 16, b"free", number))
        path.with_suffix(".txt").write_text(f"A pattern that drifts, number {number}.\n", "utf-8")
    return folder


def _write(path: Path, seed: int, size: Size, frames: int) -> None:
    import av

    if path.exists():
        return
    try:
        codec = av.codec.Codec("libx264", "w").name
    except ValueError:
        raise ConfigError(
            "PyAV has no libx264 here, so no videos can be made.", "Give --data-root."
        ) from None
    random = np.random.default_rng(seed)
    picture, grain = (
        _texture(random, size),
        random.normal(scale=_GRAIN, size=(size.height + 64, size.width + 64)),
    )
    partial = path.with_suffix(".part")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=_FPS, options={"preset": "veryfast", "crf": "21"})
        stream.height, stream.width, stream.pix_fmt = size.height, size.width, "yuv420p"
        for number in range(frames):
            top, left = random.integers(64, size=2)
            noise = grain[top : top + size.height, left : left + size.width].astype(np.int8)
            frame = av.VideoFrame.from_ndarray(_frame(picture, noise, number), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    partial.replace(path)


def _texture(random: np.random.Generator, size: Size) -> Plane:
    """Half as large again as a picture: shapes of several sizes."""
    height, width = size.height * 3 // 2, size.width * 3 // 2
    shapes = np.zeros((height, width))
    for cell in (4, 16, 64):
        coarse = random.normal(size=(height // cell + 2, width // cell + 2))
        shapes += np.kron(coarse, np.ones((cell, cell)))[:height, :width] * cell
    texture: Plane = np.clip(128 + 40 * shapes / shapes.std(), 16, 235).astype(np.uint8)
    return texture


def _frame(picture: Plane, noise: npt.NDArray[np.int8], number: int) -> Plane:
    """The picture as seen by a camera that moves on, with noise; three planes of YUV 4:2:0 under each other."""
    height, width = noise.shape
    top, left = number * 2 % (height // 2), number * 3 % (width // 2)
    luma: Plane = (picture[top : top + height, left : left + width] + noise).astype(np.uint8)
    red, blue = luma[::2, ::2] // 2 + 64, luma[1::2, ::2] // 4 + 96
    planes: Plane = np.concatenate([luma, red.reshape(-1, width), blue.reshape(-1, width)])
    return planes
