"""First frames and source videos, fitted as the encode stage fits them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcache.errors import ConfigError, VideoError
from cogcache.infer.plan import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["check_conditions", "pipeline_inputs"]


def check_conditions(plan: Plan) -> None:
    """Read every image and video once, so that a bad one is found before the model is loaded.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    for path in dict.fromkeys(plan.inputs.images):
        _picture(path, plan)
    for path in dict.fromkeys(plan.inputs.videos):
        _clip(path, plan)


def pipeline_inputs(plan: Plan, number: int) -> dict[str, Any]:
    """The arguments of the pipeline that depend on the task, for video ``number``.

    Raises:
        ConfigError: if the image or video can no longer be read.
    """
    if plan.mode == "i2v":
        image = _picture(plan.inputs.images[number], plan)
        return {"image": _as_pillow(image), "num_frames": plan.frames}
    if plan.mode == "v2v":
        frames = _clip(plan.inputs.videos[number], plan)
        return {"video": [_as_pillow(frame) for frame in frames], "strength": plan.config.strength}
    return {"num_frames": plan.frames}


def _picture(path: Path, plan: Plan) -> torch.Tensor:
    from cogcache.pictures import load_picture

    try:
        return load_picture(path, plan.size)
    except VideoError as error:
        raise ConfigError(f"--image {str(path)!r}: {error.message}.") from None


def _clip(path: Path, plan: Plan) -> torch.Tensor:
    from cogcache.video import ClipRequest, load_clip

    try:
        return load_clip(path, ClipRequest(frames=plan.frames, size=plan.size, fps=plan.fps)).frames
    except VideoError as error:
        hint = error.hint or "Fewer --frames or a higher --fps need less of a video."
        raise ConfigError(f"--video {str(path)!r}: {error.message}.", hint) from None


def _as_pillow(picture_hwc: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(picture_hwc.numpy())
