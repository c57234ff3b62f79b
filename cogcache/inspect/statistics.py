"""What the latents look like: mean and spread of each clip's posterior mean, and which clips stand out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["OUTLIER", "LatentStatistics", "pooled", "robust_z"]

OUTLIER = 5.0
"""Robust z-score from which a clip counts as an outlier."""

_NORMAL = 0.6744897501960817  # median of |x| for a standard normal x
_LEAST = 5


@dataclass(frozen=True)
class LatentStatistics:
    """Of the unscaled posterior mean of one clip, over all its values: mean, standard deviation, and how many."""

    mean: float
    std: float
    count: int


def robust_z(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """How far each value lies from the median, in standard deviations as the median deviation estimates them.

    Iglewicz and Hoaglin's modified z-score, 0.6745 (x - median) / MAD; where more than half of the values are
    equal, 0 for those and infinity for others. All 0 below five values; a value that is not finite gets infinity.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < _LEAST:
        return np.where(np.isfinite(numbers), 0.0, np.inf)
    good = numbers[np.isfinite(numbers)]
    centre = np.median(good) if len(good) else 0.0
    distance = np.abs(numbers - centre)
    distance[~np.isfinite(numbers)] = np.inf
    scale = np.median(distance[np.isfinite(distance)]) if len(good) else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = _NORMAL * distance / scale
    return np.where(distance == 0, 0.0, scores)


def pooled(parts: Sequence[LatentStatistics]) -> tuple[float, float] | None:
    """Mean and standard deviation over all values of all clips; None where there are none that are finite."""
    good = [part for part in parts if np.isfinite(part.mean) and np.isfinite(part.std)]
    total = sum(part.count for part in good)
    if not total:
        return None
    mean = sum(part.count * part.mean for part in good) / total
    square = sum(part.count * (part.std**2 + part.mean**2) for part in good) / total
    return mean, max(square - mean**2, 0.0) ** 0.5
