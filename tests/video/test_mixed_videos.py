"""A folder of difficult real videos, each treated as its README says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cogcache.errors import TooShortError, VideoError
from cogcache.geometry import Size
from cogcache.precompute.datasets import find_clips
from cogcache.video import ClipRequest, load_clip, open_video

SIZE = Size(48, 80)
BROKEN = {
    "broken/audio_only.mp4": "no video stream",
    "broken/garbage.mp4": "not a video",
    "broken/single_frame.mp4": "1 < {} frames",
    "broken/truncated.mp4": "damaged",
    "broken/zero_bytes.mp4": "empty file",
    "length/short_20f.mp4": "20 < {} frames",
    "phone/VID_vfr_41f.mp4": "41 < {} frames",
}
SHORT = {
    "b/clip.mp4": "61 < 81 frames",
    "fps/bird_12fps.mp4": "54 < 81 frames",
    "length/exact_49f.mp4": "49 < 81 frames",
}


@pytest.mark.parametrize(
    ("reader", "frames", "accepted", "failed"),
    [("auto", 49, 20, 7), ("auto", 81, 17, 10), ("pyav", 49, 20, 7)],
)
def test_every_file_as_documented(
    mixed_videos: Path, reader: str, frames: int, accepted: int, failed: int
) -> None:
    failures = {}
    done = []
    for item in find_clips(mixed_videos, "auto", False):
        try:
            clip = load_clip(item.path, ClipRequest(frames, SIZE, reader=reader))
        except VideoError as error:
            failures[item.source] = error.message
            continue
        assert clip.facts["indices"] == list(range(frames))
        done.append(item.source)
    assert (len(done), len(failures)) == (accepted, failed)
    expected = BROKEN | (SHORT if frames == 81 else {})
    assert failures.keys() == expected.keys()
    for source, reason in expected.items():
        assert failures[source].startswith(reason.format(frames))


def test_declared_facts(mixed_videos: Path) -> None:
    rows = {
        "codecs/mpeg2.mpg": (87, 3.625, Size(360, 640)),
        "codecs/vp9_opus.webm": (92, 3.833, Size(480, 854)),
        "codecs/av1.mp4": (83, 3.458, Size(480, 854)),
        "odd/anamorphic_sar32x27.mp4": (100, 4.167, Size(480, 853)),
        "phone/portrait_turn_cw90.mp4": (100, 4.167, Size(854, 480)),
        "phone/screencast_vfr.mp4": (90, 4.933, Size(360, 640)),
        "phone/vfr_pingpong_81f.mp4": (81, 3.005, Size(540, 960)),
    }
    for name, (frames, seconds, display) in rows.items():
        with open_video(mixed_videos / name, "auto") as reader:
            assert (reader.info.frames, reader.info.display) == (frames, display)
            assert reader.info.duration_s == pytest.approx(seconds, abs=0.001)


def frames_of(
    root: Path, name: str, frames: int, fps: float | None = None, size: Size = SIZE
) -> torch.Tensor:
    return load_clip(root / name, ClipRequest(frames, size, fps=fps)).frames.float()


def test_three_rates_show_the_same_motion(mixed_videos: Path) -> None:
    slow, film, fast = (frames_of(mixed_videos, f"fps/bird_{rate}fps.mp4", 17, 4) for rate in (12, 24, 60))
    motion = (film[1:] - film[:-1]).abs().mean()
    assert (slow - film).abs().mean() < motion / 4
    assert (fast - film).abs().mean() < motion / 4
    by_index = frames_of(mixed_videos, "fps/bird_60fps.mp4", 17)
    assert (by_index - film).abs().mean() > motion / 2


def test_ten_bits_are_as_bright_as_eight(mixed_videos: Path) -> None:
    deep = frames_of(mixed_videos, "codecs/h264_10bit.mp4", 49)
    same_scene = frames_of(mixed_videos, "fps/bird_24fps.mp4", 49)
    assert (deep - same_scene).abs().mean() < 3
    assert (deep.mean() - same_scene.mean()).abs() < 1


def test_equal_names_hold_different_pictures(mixed_videos: Path) -> None:
    one, other = (frames_of(mixed_videos, f"{folder}/clip.mp4", 49) for folder in "ab")
    assert (one - other).abs().mean() > 20


@pytest.mark.parametrize(("turn", "upright_name"), [("ccw90", "fps/bird_24fps.mp4"), ("cw90", None)])
def test_portrait_pictures_stand_upright(mixed_videos: Path, turn: str, upright_name: str | None) -> None:
    name = f"phone/portrait_turn_{turn}.mp4"
    frame = frames_of(mixed_videos, name, 49, size=Size(160, 96))[0]
    if upright_name is None:  # the grass is below the rabbit: green grows downwards
        green = frame[..., 1] - (frame[..., 0] + frame[..., 2]) / 2
        assert green[80:].mean() > green[:80].mean()
    both = [
        load_clip(mixed_videos / name, ClipRequest(49, Size(160, 96), reader=reader)).frames
        for reader in ("decord", "pyav")
    ]
    assert torch.equal(*both)


def test_screen_recording_goes_by_time(mixed_videos: Path) -> None:
    facts = load_clip(mixed_videos / "phone/screencast_vfr.mp4", ClipRequest(33, SIZE, fps=8)).facts
    assert np.abs(np.array(facts["times_s"]) - np.arange(33) / 8).max() <= 0.1
    with pytest.raises(TooShortError, match=r"40 < 49 frames: 4\.93 s at 8 fps"):
        load_clip(mixed_videos / "phone/screencast_vfr.mp4", ClipRequest(49, SIZE, fps=8))
