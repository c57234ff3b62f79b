"""In which bucket a clip goes: the one that wastes the least. Pure arithmetic on shapes.

The waste of a bucket for a clip is ``1 - kept * used``. *Kept* is the share of the clip's picture that survives the
fit, times the share of its frames that are taken. *Used* is the share of the bucket's values that come from
source pixels of their own: not from enlarging, black bars or repeated frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

from cogcache.errors import GeometryError
from cogcache.geometry import Bucket, FitMode, Size
from cogcache.variants import Variant

__all__ = ["ClipShape", "Placing", "choose_buckets", "place", "waste"]

_RATIOS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9, 21 / 9)
"""Width / height of the sizes that are looked at."""
_MOST = 6
_FEW = 4
"""``auto`` makes at most so many buckets, each of at least so many clips."""


@dataclass(frozen=True)
class ClipShape:
    """What of a video decides its bucket.

    Attributes:
        display: Size as a player shows it, in square pixels.
        frames: Frames that the whole video gives at the wanted rate.
        still: It holds a single picture, which makes no clip of more than one frame.
    """

    display: Size
    frames: int
    still: bool = False


@dataclass(frozen=True)
class Placing:
    """How clips are taken from videos and fitted; as the settings of encode say."""

    fit: FitMode = "cover"
    short: Literal["fail", "pad"] = "fail"
    windows: int = 1


def waste(shape: ClipShape, bucket: Bucket, placing: Placing) -> float | None:
    """Between 0 (nothing lost, nothing made up) and 1; None where the clip is too short for the bucket."""
    if bucket.frames > 1 and shape.still:
        return None
    if placing.short == "fail" and shape.frames < bucket.frames:
        return None
    frames = (
        shape.frames / placing.windows
    )  # where there are several windows, each has its share of the video
    kept_frames, used_frames = min(1.0, bucket.frames / frames), min(1.0, frames / bucket.frames)
    kept, used = _picture(shape.display, bucket.size, placing.fit)
    return 1 - kept_frames * used_frames * kept * used


def _picture(display: Size, size: Size, fit: FitMode) -> tuple[float, float]:
    """Shares of the picture that are kept, and of the target that is used.

    A stretched picture says no more than one that is fitted into the target without stretching.
    """
    ratios = (size.height / display.height, size.width / display.width)
    scale = max(ratios) if fit == "cover" else min(ratios)
    scaled, target = scale**2 * display.height * display.width, size.height * size.width
    return min(1.0, target / scaled), min(1.0, scaled / target) * min(1.0, 1 / scale**2)


def place(shape: ClipShape, buckets: Collection[Bucket], placing: Placing) -> Bucket | None:
    """The bucket with the least waste, of equal ones the largest; None where the clip is too short for all."""
    wastes = {bucket: waste(shape, bucket, placing) for bucket in buckets}
    return _least({bucket: wasted for bucket, wasted in wastes.items() if wasted is not None})


def _least(wastes: dict[Bucket, float]) -> Bucket | None:
    # Equal wastes may differ in their last bits.
    return min(wastes, key=lambda b: (round(wastes[b], 9), -b.volume, b), default=None)


def choose_buckets(shapes: Iterable[ClipShape], variant: Variant, placing: Placing) -> list[Bucket]:
    """Buckets that suit these clips, sorted: what ``--bucket auto`` takes.

    Their pictures have about the area of the model's default size, in usual aspect ratios; their frame counts are the
    model's own and shorter ones. The bucket with the fewest clips is dropped, and its clips go to the next best, until
    few are left and each holds some clips. A bucket stays where its clips would be too short for all others.
    """
    candidates = _candidates(variant)
    longest = max(bucket.frames for bucket in candidates) * placing.windows
    # Frames beyond the longest bucket lower all wastes alike.
    clips = Counter(replace(shape, frames=min(shape.frames, longest)) for shape in shapes)
    wastes = {
        shape: {b: wasted for b in candidates if (wasted := waste(shape, b, placing)) is not None}
        for shape in clips
    }
    wastes = {shape: fitting for shape, fitting in wastes.items() if fitting}
    if not wastes:
        return [Bucket.of(variant.sample_frames, variant.default_size)]
    chosen = set(candidates)
    while True:
        held = _held(wastes, clips, chosen)
        chosen = set(held)
        smallest = sorted(chosen, key=lambda bucket: (held[bucket], bucket.volume, bucket))
        droppable = (b for b in smallest if all(f.keys() & (chosen - {b}) for f in wastes.values()))
        dropped = next(droppable, None)
        if dropped is None or (len(chosen) <= _MOST and held[dropped] >= _FEW):
            return sorted(chosen)
        chosen.remove(dropped)


def _held(
    wastes: dict[ClipShape, dict[Bucket, float]], clips: Counter[ClipShape], chosen: set[Bucket]
) -> Counter[Bucket]:
    """Clips in each of ``chosen`` that has any."""
    held: Counter[Bucket] = Counter()
    for shape, fitting in wastes.items():
        bucket = _least({b: wasted for b, wasted in fitting.items() if b in chosen})
        assert bucket is not None
        held[bucket] += clips[shape]
    return held


def _candidates(variant: Variant) -> list[Bucket]:
    """All that :func:`choose_buckets` may choose, every one allowed by the model."""
    default = variant.default_size
    longest = variant.sample_frames
    shorter = ((longest // part) // 8 * 8 + 1 for part in (2, 4))
    counts = sorted({longest, *(count for count in shorter if count > 1)})  # a still is no clip
    sizes = sorted({default, *(_of_ratio(default, ratio, variant.size_multiple) for ratio in _RATIOS)})
    return [
        bucket
        for size in sizes
        for bucket in (Bucket.of(n, size) for n in counts)
        if _allowed(bucket, variant)
    ]


def _of_ratio(like: Size, ratio: float, multiple: int) -> Size:
    """A size of about the area of ``like``, sides multiples of ``multiple`` pixels."""
    area = like.height * like.width
    sides = (sqrt(area / ratio), sqrt(area * ratio))
    return Size(*(max(multiple, round(side / multiple) * multiple) for side in sides))


def _allowed(bucket: Bucket, variant: Variant) -> bool:
    try:
        variant.check_clip(bucket.frames, bucket.size)
    except GeometryError:
        return False
    return True
