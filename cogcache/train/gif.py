"""Videos for TensorBoard, which shows animated GIFs where it shows images."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["gif_summary"]

_LONGEST = 480
"""Longest side in pixels: event files keep every GIF for good."""


def gif_summary(tag: str, frames_fhwc: npt.NDArray[np.uint8], fps: float) -> Any:
    """A TensorBoard summary with the RGB frames [F, H, W, 3] as one animated GIF, made smaller where large."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    pictures = [Image.fromarray(frame) for frame in frames_fhwc]
    for picture in pictures:
        picture.thumbnail((_LONGEST, _LONGEST))
    stream = io.BytesIO()
    milliseconds = max(20, round(1000 / fps))  # browsers slow down anything faster
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)
    width, height = pictures[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=stream.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])
