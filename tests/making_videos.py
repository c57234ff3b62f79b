"""Small synthetic videos whose every frame says its number, for tests of reading."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH = 96, 160
X264 = {"g": "12", "bf": "3", "crf": "10"}


def picture(number: int) -> np.ndarray:
    """uint8 [96, 160, 3]: the number as 8 black or white blocks, red at bottom left, blue at bottom right."""
    frame = np.full((HEIGHT, WIDTH, 3), 40 + number % 128, np.uint8)
    for bit in range(8):
        frame[8:40, 16 + 16 * bit : 32 + 16 * bit] = 255 * (number >> bit & 1)
    frame[60:, :40] = (200, 30, 30)
    frame[60:, 120:] = (30, 30, 200)
    return frame


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that upright frames [F, 96, 160, 3] show."""
    return [sum(int(f[24, 24 + 16 * bit].mean() > 128) << bit for bit in range(8)) for f in frames]


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 60,
    fps: int = 24,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    times_s: Sequence[float] | None = None,
    tick: Fraction = Fraction(1, 90000),
    setup: Callable[[Any], None] = lambda _: None,
    image: Callable[[int], np.ndarray] = picture,
    rgb: str = "rgb24",
) -> Path:
    """Encode ``frames`` pictures; at ``times_s`` where given, else at a constant ``fps``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = image(0).shape[:2]
        stream.pix_fmt = pix_fmt
        if times_s is not None:
            stream.codec_context.time_base = tick
        setup(stream)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(image(number), format=rgb)
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[number] / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def ffmpeg(*arguments: object) -> bytes:
    """Run the ffmpeg program, for what PyAV's muxers cannot write."""
    import imageio_ffmpeg  # brings a program with it; tests that need none run without

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout
