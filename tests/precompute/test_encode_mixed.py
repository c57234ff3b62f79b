"""A messy folder of real files, each treated as its README says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.errors import PartialFailureError
from cogcache.precompute import encode
from cogcache.tiny import Family

BROKEN = {
    "broken/audio_only.mp4": "no video stream",
    "broken/garbage.mp4": "not a video",
    "broken/single_frame.mp4": "1 ",
    "broken/truncated.mp4": "damaged",
    "broken/zero_bytes.mp4": "empty file",
    "length/short_20f.mp4": "20 ",
    "phone/VID_vfr_41f.mp4": "41 ",
}
TOO_SHORT_FOR_81 = {"b/clip.mp4": "61 ", "fps/bird_12fps.mp4": "54 ", "length/exact_49f.mp4": "49 "}


@pytest.mark.parametrize(("frames", "failing"), [(49, BROKEN), (81, BROKEN | TOO_SHORT_FOR_81)])
def test_every_file_is_treated_as_its_readme_says(
    mixed_videos: Path,
    tiny_models: Callable[[Family], Path],
    tmp_path: Path,
    frames: int,
    failing: dict[str, str],
) -> None:
    config = EncodeConfig(
        data_root=mixed_videos,
        model=str(tiny_models("1.5-5b")),
        shards=tmp_path / "shards",
        frames=frames,
        size="16x16",
        fps="source",
        device="cpu",
    )
    with pytest.raises(PartialFailureError, match=f"^{len(failing)} of 27 clips failed") as raised:
        encode(config)
    assert raised.value.exit_code == 3
    rows = [json.loads(line) for line in (tmp_path / "shards" / "failures.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == failing.keys()
    for row in rows:
        assert failing[row["source"]] in row["reason"], row
    samples = CacheReader(tmp_path / "shards").samples
    assert len(samples) == 27 - len(failing)
    assert len({sample.latents for sample in samples}) == len(samples)
    listed = [json.loads(line) for line in (mixed_videos / "metadata.jsonl").read_text("utf-8").splitlines()]
    captions = {row["file_name"]: row["text"] for row in listed}
    assert all(sample.caption == captions[sample.source] for sample in samples)
