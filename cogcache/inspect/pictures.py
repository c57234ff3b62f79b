"""Small pictures of clips: three frames of the video where it is there, else of the latent in false colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cogcache.errors import CogcacheError

__all__ = ["false_colours", "find_video", "strip", "video_frames"]

_HEIGHT = 72
_WIDEST = 480
_QUALITY = 55
Pictures = npt.NDArray[np.uint8]


def find_video(data_root: Path | None, source: str) -> Path | None:
    """The video that a sample names, if it is there and lies below the data root."""
    if data_root is None:
        return None
    try:
        root = data_root.resolve()
        path = (root / source).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def video_frames(path: Path, facts: Mapping[str, Any]) -> list[Pictures] | None:
    """First, middle and last frame of the clip, uint8 RGB [H, W, 3]; None if the video cannot be read."""
    from cogcache.video import open_video

    try:
        reader = open_video(path, "auto")
    except CogcacheError:
        return None
    try:
        last = len(reader.timestamps) - 1
        picked = [min(int(index), last) for index in facts.get("indices") or [0]]
        wanted = [picked[0], picked[len(picked) // 2], picked[-1]]
        display = reader.info.display
        return [_resized(frame, display.width / display.height) for frame in reader.read(wanted)]
    except (CogcacheError, TypeError, ValueError):
        return None
    finally:
        reader.close()


def _resized(frame: Pictures, aspect: float) -> Pictures:
    width = max(round(_HEIGHT * aspect), 1)
    return np.asarray(
        Image.fromarray(frame).resize((width, _HEIGHT), Image.Resampling.BILINEAR, reducing_gap=2)
    )


def false_colours(mean_cfhw: npt.NDArray[np.float32]) -> list[Pictures]:
    """First, middle and last latent frame, their three principal channels as red, green and blue.

    The strongest component is green, where the eye sees brightness. Signs are fixed, so that equal latents look
    equal. Values that are not finite are black.
    """
    channels, frames, height, width = mean_cfhw.shape
    chosen = mean_cfhw[:, [0, frames // 2, frames - 1]].reshape(channels, -1)
    chosen = np.nan_to_num(chosen.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    chosen -= chosen.mean(axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(chosen @ chosen.T)
    axes = vectors[:, ::-1][:, [1, 0, 2] if channels > 2 else [0, 0, 0]]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(3)])
    values = axes.T @ chosen
    low, high = np.percentile(values, [2, 98], axis=1, keepdims=True)
    colours = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1) * 255
    pictures = colours.round().astype(np.uint8).reshape(3, 3, height, width).transpose(1, 2, 3, 0)
    return [_resized(picture, width / height) for picture in pictures]


def strip(frames: list[Pictures]) -> str:
    """Frames side by side as a data URI (WebP)."""
    picture = Image.fromarray(np.concatenate(frames, axis=1))
    picture.thumbnail((_WIDEST, _HEIGHT))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")
