"""Which clips are held out of training for validation: always whole videos, never single clips of one.

Windows of one video show the same scene, so splitting them would let training see what validation asks about.
The same file listed under two names is one video, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cogcache.cache.format import SampleRecord, digest
from cogcache.config import TrainConfig
from cogcache.draws import seed_for
from cogcache.errors import ConfigError

__all__ = ["describe", "split_holdout"]

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def split_holdout(
    records: Sequence[SampleRecord], config: TrainConfig
) -> tuple[list[SampleRecord], list[SampleRecord]]:
    """Training samples and held-out samples, each in the order of ``records``.

    ``--holdout`` is a percentage of the videos, which the seed picks, or a file with a source on each line as
    ``samples.jsonl`` names it (blank lines do not matter).

    Raises:
        ConfigError: if a source is not in the cache, or nothing is left on either side.
    """
    if config.holdout is None or not records:
        return list(records), []
    videos = _videos(records)
    percent = _PERCENT.fullmatch(config.holdout)
    chosen = _part(videos, float(percent[1]), config.seed) if percent else _listed(videos, config.holdout)
    held_out = [record for record in records if videos[record.source] in chosen]
    training = [record for record in records if videos[record.source] not in chosen]
    if not training:
        raise ConfigError(f"--holdout {config.holdout} leaves no clip to train on.", "Hold fewer videos out.")
    return training, held_out


def describe(held_out: Sequence[SampleRecord]) -> str | None:
    """What a checkpoint records of the split; equal for equal splits. None without one."""
    if not held_out:
        return None
    return f"{len(held_out)} clips, {digest([record.id for record in held_out])[:16]}"


def _videos(records: Sequence[SampleRecord]) -> dict[str, str]:
    """Source -> video: copies of a file are one, and settings of encode do not change which are held out."""
    return {record.source: record.sha256 for record in records}


def _part(videos: dict[str, str], percent: float, seed: int) -> set[str]:
    names = sorted(set(videos.values()), key=lambda video: seed_for(seed, "holdout", video))
    count = round(len(names) * percent / 100)
    if not count:
        least = 100 / (2 * len(names))
        raise ConfigError(
            f"--holdout {percent:g}% of {len(names)} videos leaves none for validation.",
            f"Give more than {least:.3g}%, or a file that lists the sources to hold out.",
        )
    return set(names[:count])


def _listed(videos: dict[str, str], holdout: str) -> set[str]:
    try:
        lines = Path(holdout).read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--holdout {holdout!r} is neither a percentage such as 5% nor a file that can be read: {error}"
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    unknown = [name for name in names if name not in videos]
    if unknown or not names:
        what = f"names sources that are not in the cache: {', '.join(unknown)}" if unknown else "is empty"
        raise ConfigError(f"--holdout {holdout} {what}.", "List sources as samples.jsonl spells them.")
    return {videos[name] for name in names}
