"""One clip, from its file to fitted frames. Safe to call from several threads at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cogcache.geometry import FitMode, FitPlan, Size, plan_fit
from cogcache.pictures import Interpolation, fit_frame
from cogcache.video.choose import ReaderChoice, open_video
from cogcache.video.picking import Picked, Window, pick
from cogcache.video.protocol import VideoReader

__all__ = ["Clip", "ClipRequest", "load_clip", "load_first_frame"]


@dataclass(frozen=True)
class ClipRequest:
    """What is wanted of a video.

    Attributes:
        frames: Number of frames.
        size: Picture size in pixels.
        fps: Frames per second to pick by timestamp; ``None`` takes consecutive frames of the source.
        window: Where in the video.
        short: What to do with a video that is too short: fail, or repeat its last frame.
        fit: How another aspect ratio is dealt with.
        interpolation: Resampling filter.
        reader: Video reader.
    """

    frames: int
    size: Size
    fps: float | None = None
    window: Window = field(default_factory=Window)
    short: Literal["fail", "pad"] = "fail"
    fit: FitMode = "cover"
    interpolation: Interpolation = "bicubic"
    reader: ReaderChoice = "auto"


@dataclass(frozen=True)
class Clip:
    """Fitted frames, uint8 RGB [F, H, W, 3], contiguous; and ``facts`` about their making, as JSON."""

    frames: torch.Tensor
    facts: dict[str, Any]


def load_clip(path: Path, request: ClipRequest) -> Clip:
    """Read, pick and fit one clip. Holds the fitted clip and a few source frames in memory.

    Raises:
        VideoError: with the reason (without the file's name), if the file cannot be used.
        TooShortError: if it has too few frames.
    """
    return _read(path, request, request.frames)


def load_first_frame(path: Path, request: ClipRequest) -> torch.Tensor:
    """The first frame of the clip that ``request`` picks, fitted: uint8 RGB [H, W, 3].

    Raises:
        VideoError, TooShortError: as :func:`load_clip`, for the whole clip.
    """
    return _read(path, request, 1).frames[0]


def _read(path: Path, request: ClipRequest, keep: int) -> Clip:
    with open_video(path, request.reader) as reader:
        return _load(reader, request, keep)


def _load(reader: VideoReader, request: ClipRequest, keep: int) -> Clip:
    info = reader.info
    picked = pick(
        reader.timestamps,
        info.duration_s,
        info.tick_s,
        request.frames,
        request.fps,
        request.window,
        request.short,
    )
    plan = plan_fit(info.display, request.size, request.fit)
    frames = _fitted(reader, picked.indices[:keep], plan, request.interpolation)
    return Clip(frames, _facts(reader, picked, plan))


def _fitted(
    reader: VideoReader, indices: Sequence[int], plan: FitPlan, interpolation: Interpolation
) -> torch.Tensor:
    """uint8 [F, H, W, 3]; every source frame is read and fitted once."""
    frames = np.empty((len(indices), plan.target.height, plan.target.width, 3), np.uint8)
    unique = sorted(set(indices))
    for index, frame in zip(unique, reader.stream(unique), strict=True):
        fitted = fit_frame(torch.from_numpy(frame.copy()), plan, interpolation)
        for slot, wanted in enumerate(indices):
            if wanted == index:
                frames[slot] = fitted.numpy()
    return torch.from_numpy(frames)


def _facts(reader: VideoReader, picked: Picked, plan: FitPlan) -> dict[str, Any]:
    info = reader.info
    return {
        "reader": reader.name,
        "codec": info.codec,
        "container": info.container,
        "source_frames": info.frames,
        "source_fps": round(info.fps, 6),
        "source_duration_s": round(info.duration_s, 6),
        "stored_size": str(info.stored),
        "display_size": str(info.display),
        "rotation": info.rotation,
        "mirrored": info.mirrored,
        "sample_aspect_ratio": str(info.sample_aspect_ratio),
        "indices": list(picked.indices),
        "times_s": [round(float(reader.timestamps[index]), 6) for index in picked.indices],
        "padded": picked.padded,
        "repeated": picked.repeated,
        "fit": {
            "resized": str(plan.resized),
            "target": str(plan.target),
            "top": plan.top,
            "left": plan.left,
        },
    }
