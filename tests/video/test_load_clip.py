"""One clip from file to fitted frames."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making_videos import HEIGHT, WIDTH, X264, ffmpeg, numbers, picture, write_video

from cogcache.errors import TooShortError, VideoError
from cogcache.geometry import Size
from cogcache.precompute.datasets import find_clips
from cogcache.video import ClipRequest, Window, load_clip, pyav_reader
from cogcache.video import container as container_module
from cogcache.video.decord_reader import DecordReader

DEMO = Path(__file__).parents[2] / "cogcache" / "demo" / "bunny"
SIZE = Size(HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 numbered frames at 24 fps."""
    return write_video(tmp_path_factory.mktemp("clip") / "x.mp4", frames=180, options=X264)


def test_source_rate(counting: Path) -> None:
    clip = load_clip(counting, ClipRequest(49, SIZE))
    assert (clip.frames.dtype, clip.frames.shape) == (torch.uint8, (49, HEIGHT, WIDTH, 3))
    assert clip.frames.is_contiguous()
    assert numbers(clip.frames.numpy()) == list(range(49))


@pytest.mark.parametrize(("fps", "frames"), [(8, 49), (12, 81), (4, 25)])
def test_resampled(counting: Path, fps: int, frames: int) -> None:
    clip = load_clip(counting, ClipRequest(frames, SIZE, fps=fps, window=Window("centre")))
    step = 24 // fps
    begin = (180 - frames * step) // 2
    assert (
        numbers(clip.frames.numpy())
        == clip.facts["indices"]
        == list(range(begin, begin + frames * step, step))
    )
    assert clip.facts["times_s"] == pytest.approx([i / 24 for i in clip.facts["indices"]], abs=1e-5)


def test_repeats_and_padding(counting: Path) -> None:
    fast = load_clip(counting, ClipRequest(9, SIZE, fps=48))
    assert numbers(fast.frames.numpy()) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert fast.facts["repeated"] == 4
    padded = load_clip(counting, ClipRequest(185, SIZE, short="pad"))
    assert numbers(padded.frames.numpy()) == [*range(180), *[179] * 5]
    assert padded.facts["padded"] == 5
    with pytest.raises(TooShortError, match="180 < 185 frames"):
        load_clip(counting, ClipRequest(185, SIZE))


def test_facts_are_json_and_say_what_was_done(counting: Path) -> None:
    facts = load_clip(counting, ClipRequest(9, Size(48, 48))).facts
    assert json.loads(json.dumps(facts)) == facts
    assert {**facts, "indices": 0, "times_s": 0} == {
        "reader": "pyav",
        "codec": "h264",
        "container": "mov,mp4,m4a,3gp,3g2,mj2",
        "source_frames": 180,
        "source_fps": 24.0,
        "source_duration_s": 7.5,
        "stored_size": "96x160",
        "display_size": "96x160",
        "rotation": 0,
        "mirrored": False,
        "sample_aspect_ratio": "1",
        "indices": 0,
        "times_s": 0,
        "padded": 0,
        "repeated": 0,
        "fit": {"resized": "48x80", "target": "48x48", "top": 0, "left": 16},
    }


def test_turned_and_anamorphic_video_is_fitted_by_what_is_shown(counting: Path, tmp_path: Path) -> None:
    ffmpeg("-display_rotation", 90, "-i", counting, "-c", "copy", tmp_path / "turned.mp4")
    clip = load_clip(tmp_path / "turned.mp4", ClipRequest(9, Size(WIDTH, HEIGHT)))
    upright = np.rot90(picture(0))
    assert np.abs(clip.frames[0].numpy().astype(int) - upright).mean() < 6

    ffmpeg("-i", counting, "-c", "copy", "-aspect", "10:3", tmp_path / "wide.mp4")  # pixels twice as wide
    wide = load_clip(tmp_path / "wide.mp4", ClipRequest(9, Size(HEIGHT, 2 * WIDTH)))
    assert wide.facts["display_size"] == "96x320"
    assert numbers(wide.frames[:, :, ::2].numpy()) == list(range(9))


def test_decord_by_name_fails_without_another_reader(counting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_clip(counting, ClipRequest(25, SIZE, reader="decord")).facts["reader"] == "decord"
    monkeypatch.setattr(DecordReader, "_check_shape", _break)
    with pytest.raises(VideoError, match="decord broke"):
        load_clip(counting, ClipRequest(25, SIZE, reader="decord"))


def _break(*_: Any) -> None:
    raise VideoError("decord broke")


def test_a_picture_is_decoded_once(counting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those up to the last one that is wanted, and the first once more for a look at the file."""
    decoded = []

    def counted(container: Any, stream: Any) -> Any:
        for frame in container_module.decode_all(container, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(pyav_reader, "decode_all", counted)
    clip = load_clip(counting, ClipRequest(9, SIZE, fps=8, window=Window("centre")))
    before = clip.facts["indices"][0] % 12  # a key frame every 12
    assert len(decoded) == len(set(decoded)) == before + 8 * 3 + 1


def test_threads_agree(counting: Path) -> None:
    requests = [
        ClipRequest(33, SIZE, fps=fps, window=window, reader=reader)
        for fps in (None, 8, 12)
        for window in (Window(), Window("centre"))
        for reader in ("auto", "decord")
    ]
    alone = [load_clip(counting, request).frames for request in requests]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: load_clip(counting, request).frames, requests))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_memory_stays_small(tmp_path: Path) -> None:
    """numpy's allocations while reading a 1080p clip: a few frames, not the file (180 MB here)."""

    def big(number: int) -> np.ndarray:
        return np.full((1080, 1920, 3), number, np.uint8)

    path = write_video(tmp_path / "big.mp4", frames=30, options={"preset": "ultrafast"}, image=big)
    for reader, frames_held in (("pyav", 4), ("decord", 12)):
        tracemalloc.start()
        load_clip(path, ClipRequest(25, Size(48, 80), reader=reader))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < frames_held * 1080 * 1920 * 3


def test_the_demo_clips_load() -> None:
    for item in find_clips(DEMO, "auto", False):
        clip = load_clip(item.path, ClipRequest(49, Size(48, 80)))
        assert clip.frames.float().std() > 10
        assert clip.facts["source_frames"] >= 83
    assert load_clip(item.path, ClipRequest(25, Size(48, 80), fps=8)).facts["indices"] == list(
        range(0, 75, 3)
    )
