"""Which clips are held out.

Mutations tried, each caught: split by clip; copies of a file on both sides; seed ignored; count rounded up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogcache.cache.format import SampleRecord
from cogcache.config import TrainConfig
from cogcache.errors import ConfigError
from cogcache.train.holdout import describe, split_holdout


def record(source: str, window: int = 0, content: str | None = None) -> SampleRecord:
    return SampleRecord(
        id=f"{source}-{window}",
        source=source,
        sha256=content or source,
        window=f"part {window}",
        caption="",
        frames=9,
        height=32,
        width=48,
        fps=8.0,
        latents=f"{source}-{window}",
        text="t",
    )


RECORDS = [record(f"{n:02d}.mp4", window) for window in range(3) for n in range(20)]


def split(holdout: Path | str | None, records: list[SampleRecord] = RECORDS, **more: Any) -> Any:
    config = TrainConfig(shards=Path("none"), holdout=str(holdout) if holdout else None, **more)
    return split_holdout(records, config)


def sources(records: list[SampleRecord]) -> set[str]:
    return {record.source for record in records}


def test_a_part_of_the_videos_with_all_their_clips() -> None:
    training, held_out = split("15%")
    assert len(sources(held_out)) == 3
    assert len(held_out) == 9
    assert not sources(training) & sources(held_out)
    assert sorted(r.id for r in training + held_out) == sorted(r.id for r in RECORDS)
    assert [r for r in RECORDS if r in training] == training


def test_the_seed_alone_decides() -> None:
    first = split("15%")
    assert split("15.0 %") == first
    reordered = split("15%", RECORDS[::-1])
    assert sources(reordered[1]) == sources(first[1])
    assert any(sources(split("15%", seed=seed)[1]) != sources(first[1]) for seed in range(3))
    bigger = split("50%")
    assert sources(first[1]) < sources(bigger[1])


def test_a_list_of_sources(tmp_path: Path) -> None:
    listed = tmp_path / "held-out.txt"
    listed.write_text("\ufeff07.mp4\r\n\n03.mp4\n", "utf-8")
    training, held_out = split(listed)
    assert sources(held_out) == {"03.mp4", "07.mp4"}
    assert len(training) == 54
    listed.write_text("03.mp4\n99.mp4\n98.mp4\n")
    with pytest.raises(ConfigError, match=r"not in the cache: 99\.mp4, 98\.mp4"):
        split(listed)
    listed.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        split(listed)


def test_copies_of_a_file_stay_together(tmp_path: Path) -> None:
    copies = [record(f"{name}.mp4", window, "same") for name in "ab" for window in (0, 1)]
    others = [record("c.mp4"), record("d.mp4")]
    listed = tmp_path / "held-out.txt"
    listed.write_text("b.mp4\n")
    assert sources(split(listed, copies + others)[1]) == {"a.mp4", "b.mp4"}
    for seed in range(5):
        training, held_out = split("34%", copies + others, seed=seed)
        assert not {"a.mp4", "b.mp4"} & sources(training) or not {"a.mp4", "b.mp4"} & sources(held_out)


@pytest.mark.parametrize(
    ("holdout", "words"),
    [
        ("2%", "leaves none for validation"),
        ("0%", "leaves none for validation"),
        ("100%", "leaves no clip to train on"),
        ("200%", "leaves no clip to train on"),
        ("5", "neither a percentage such as 5% nor a file"),
        ("-5%", "neither a percentage"),
    ],
)
def test_a_split_of_nothing_is_refused(holdout: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        split(holdout)
    if holdout == "2%":
        assert "more than 2.5%" in caught.value.hint


def test_without_a_holdout_all_is_training() -> None:
    assert split(None) == (RECORDS, [])
    assert split("5%", []) == ([], [])
    assert describe([]) is None
    assert describe(RECORDS[:2]) != describe(RECORDS[1:3])
