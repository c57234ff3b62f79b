"""Frame counts and picture sizes: what a CogVideoX model can take, and how a picture is fitted.

The VAE compresses 4x in time after the first frame and works through 8 frames at a time, so clips
hold 8N + 1 frames and give 2N + 1 latent frames. It compresses 8x in space, and the transformer cuts the
latent into patches, so height and width are multiples of (VAE factor x patch size), 16 for all families.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cogcache.errors import GeometryError

__all__ = [
    "Bucket",
    "FitMode",
    "FitPlan",
    "Size",
    "check_frames",
    "check_size",
    "latent_frames",
    "parse_bucket",
    "parse_size",
    "plan_fit",
]

FitMode = Literal["cover", "pad", "stretch"]


@dataclass(frozen=True, order=True)
class Size:
    """A picture size in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def parse_size(text: str) -> Size:
    """Read ``"480x720"`` (height x width) as a :class:`Size`.

    Raises:
        GeometryError: if the text is not two positive whole numbers joined by ``x``.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX]\s*(\d{1,6})\s*", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise GeometryError(f"{text[:40]!r} is not a size.", "Give height x width in pixels: 480x720.")
    return Size(int(match[1]), int(match[2]))


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that clips of one batch share: frames, and height and width in pixels. Sorts by frames first."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, frames: int, size: Size) -> Bucket:
        """From frames and a picture size."""
        return cls(frames, size.height, size.width)

    @property
    def size(self) -> Size:
        """The picture size."""
        return Size(self.height, self.width)

    @property
    def volume(self) -> int:
        """Pixels of all frames."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def parse_bucket(text: str) -> Bucket:
    """Read ``"49x480x720"`` (frames x height x width) as a :class:`Bucket`.

    Raises:
        GeometryError: if the text is not three positive whole numbers joined by ``x``.
    """
    match = re.fullmatch(
        r"\s*([1-9]\d{0,5})\s*x\s*([1-9]\d{0,5})\s*x\s*([1-9]\d{0,5})\s*", text, re.IGNORECASE | re.ASCII
    )
    if not match:
        raise GeometryError(f"{text[:60]!r} is not a bucket.", "Give frames x height x width: 49x480x720.")
    return Bucket(*(int(number) for number in match.groups()))


def check_frames(frames: int) -> int:
    """Return ``frames`` if it is 8N + 1.

    Raises:
        GeometryError: naming the two nearest right counts.
    """
    if frames >= 1 and frames % 8 == 1:
        return frames
    below = max(1, (frames - 1) // 8 * 8 + 1)
    raise GeometryError(
        f"{frames} frames cannot be encoded: the count must be 8N+1.",
        f"The nearest are {below} and {below + 8}.",
    )


def check_size(size: Size, multiple: int) -> Size:
    """Return ``size`` if height and width are positive multiples of ``multiple`` pixels.

    Raises:
        GeometryError: naming the nearest right size.
    """
    if size.height % multiple == 0 and size.width % multiple == 0:
        return size
    sides = size.height, size.width  # of any length: a config may say anything
    near = Size(*(max(multiple, (n + multiple // 2) // multiple * multiple) for n in sides))
    raise GeometryError(
        f"{size} cannot be encoded: height and width must be multiples of {multiple}.",
        f"The nearest is {near}.",
    )


def latent_frames(frames: int, compression: int = 4) -> int:
    """Latent frames that ``frames`` video frames give: 13 for 49, 21 for 81."""
    return (frames - 1) // compression + 1


@dataclass(frozen=True)
class FitPlan:
    """How a picture becomes one of another size: resize, then crop or pad around the centre.

    ``resized`` is the size after interpolation; ``top``/``left`` is where the target window begins in it
    (negative: that many rows/columns of black are added before).
    """

    resized: Size
    target: Size
    top: int
    left: int


def plan_fit(display: Size, target: Size, mode: FitMode) -> FitPlan:
    """Plan the fit of a picture with the *display* shape (after rotation and sample aspect ratio).

    ``cover`` fills the target and crops what hangs over; ``pad`` shows all and adds black bars;
    ``stretch`` ignores the aspect ratio.
    """
    if mode == "stretch":
        return FitPlan(target, target, 0, 0)
    ratios = (target.height / display.height, target.width / display.width)
    scale = max(ratios) if mode == "cover" else min(ratios)
    bound = max if mode == "cover" else min
    resized = Size(
        bound(target.height, round(display.height * scale)),
        bound(target.width, round(display.width * scale)),
    )
    top = (resized.height - target.height) // 2
    left = (resized.width - target.width) // 2
    return FitPlan(resized, target, top, left)
