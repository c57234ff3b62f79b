"""One picture: read upright from a file, and fitted to the size the model takes.

Encoding and inference share it, so that a first frame given at inference looks as those in training did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from cogcache.errors import VideoError
from cogcache.geometry import FitMode, FitPlan, Size, plan_fit

__all__ = ["Interpolation", "fit_frame", "load_picture"]

Interpolation = Literal["bicubic", "bilinear"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000")
"""Pillow knows more; for one of them (EPS) it starts another program."""


def load_picture(
    path: Path, size: Size, fit: FitMode = "cover", interpolation: Interpolation = "bicubic"
) -> torch.Tensor:
    """Read a picture file, turn it upright by its EXIF orientation, and fit it: uint8 RGB [H, W, 3].

    Raises:
        VideoError: with the reason (without the file's name), if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        Image.init()
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow's own conversion cuts 16 bits off at 255
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            pixels = torch.from_numpy(np.asarray(upright.convert("RGB")).copy())
    except Exception as error:  # Pillow's readers raise many kinds over damaged files; all mean the same
        reason = str(error) or type(error).__name__
        raise VideoError(f"the image cannot be read: {reason}") from None
    return fit_frame(pixels, plan_fit(Size(*pixels.shape[:2]), size, fit), interpolation)


def fit_frame(frame_hwc: torch.Tensor, plan: FitPlan, interpolation: Interpolation) -> torch.Tensor:
    """Resize, then crop or pad with black.

    The stored picture goes straight to ``plan.resized``, which follows the display shape: pixels that are not
    square are evened out in the same step. Resampling is antialiased and done in uint8; it stays within a
    few grey levels of float resampling, 0.1 on average.

    Args:
        frame_hwc: uint8 [H, W, 3].

    Returns:
        uint8 [target height, target width, 3], contiguous.
    """
    picture = frame_hwc.unsqueeze(0).permute(0, 3, 1, 2)  # in this order torch sees that channels are last
    size = (plan.resized.height, plan.resized.width)
    if tuple(picture.shape[-2:]) != size:
        picture = F.interpolate(picture, size=size, mode=interpolation, align_corners=False, antialias=True)
    resized = picture.squeeze(0).permute(1, 2, 0)
    rows, into_rows = _overlap(plan.top, plan.resized.height, plan.target.height)
    columns, into_columns = _overlap(plan.left, plan.resized.width, plan.target.width)
    # By numpy, in this thread alone: torch would have a team of threads for each thread that reads videos.
    fitted = np.zeros((plan.target.height, plan.target.width, 3), np.uint8)
    fitted[into_rows, into_columns] = resized.numpy()[rows, columns]
    return torch.from_numpy(fitted)


def _overlap(offset: int, length: int, target: int) -> tuple[slice, slice]:
    """What to take of ``length`` pixels, and where it goes, when the target begins at ``offset`` in them."""
    begin = max(0, offset)
    end = min(length, offset + target)
    return slice(begin, end), slice(begin - offset, end - offset)
