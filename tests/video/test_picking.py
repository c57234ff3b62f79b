"""Picking frames by timestamp: properties, and the cases that went wrong elsewhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogcache.errors import TooShortError
from cogcache.video.picking import Picked, Window, pick

START = Window()


def steady(frames: int, fps: float) -> tuple[np.ndarray, float, float]:
    """Timestamps, duration and tick of a video of constant rate in MP4."""
    return np.arange(frames) / fps, frames / fps, 1 / (512 * fps)


def picked(video: tuple[np.ndarray, float, float], frames: int, fps: float | None, **more: object) -> Picked:
    settings = {"window": START, "short": "fail"} | more
    return pick(*video, frames, fps, **settings)


def test_consecutive_frames_of_each_window() -> None:
    video = steady(100, 24)
    assert picked(video, 49, None).indices == tuple(range(49))
    assert picked(video, 49, None, window=Window("centre")).indices == tuple(range(26, 75))
    starts = [picked(video, 49, None, window=Window("part", i, 4)).indices[0] for i in range(4)]
    assert starts == [0, 17, 34, 51]
    assert picked(video, 49, None, window=Window("part", 0, 1)).indices[0] == 0


def test_windows_by_time() -> None:
    video = steady(240, 24)  # 10 s
    first = picked(video, 17, 8, window=Window("part", 0, 3))
    last = picked(video, 17, 8, window=Window("part", 2, 3))
    assert (first.indices[0], last.indices[0]) == (0, 189)  # 10 s - 17/8 s = 7.875 s
    assert picked(video, 17, 8, window=Window("centre")).indices[0] == 94


@pytest.mark.parametrize("fps", [12, 24, 60])
def test_equal_motion_at_any_source_rate(fps: int) -> None:
    indices = np.array(picked(steady(5 * fps, fps), 17, 4).indices)
    assert (indices / fps).tolist() == (np.arange(17) / 4).tolist()


def test_60_to_8_takes_the_frame_on_screen() -> None:
    assert picked(steady(266, 60), 9, 8).indices == (0, 7, 15, 22, 30, 37, 45, 52, 60)


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("source", [24, 24000 / 1001, 30, 60, 50])
def test_rounded_timestamps_pick_what_exact_ones_would(source: float, offset: float) -> None:
    exact = np.arange(300) / source
    rounded = np.round(exact * 1000 + offset) / 1000  # 41 and 42 ms in turn
    rounded -= rounded[0]
    for fps in (source / 2, source / 3, source):
        want = picked((exact, 300 / source, 1e-4), 49, fps).indices
        assert picked((rounded, 300 / source, 1e-3), 49, fps).indices == want


def test_variable_rate_goes_by_time_not_by_index() -> None:
    times = np.concatenate([np.arange(60) / 30, 2 + np.arange(30) / 10])
    indices = picked((times, 5.0, 1 / 15360), 40, 8).indices
    assert times[list(indices)] == pytest.approx(np.arange(40) / 8, abs=0.1)
    assert indices[16:24] == (60, 61, 62, 63, 65, 66, 67, 68)


@pytest.mark.parametrize(
    ("video", "frames", "fps", "reason"),
    [
        (steady(20, 24), 49, None, "20 < 49 frames"),
        (steady(48, 24), 49, 24, "48 < 49 frames: 2.00 s at 24 fps"),
        (steady(49, 24), 49, 8, "17 < 49 frames: 2.04 s at 8 fps"),
        (steady(1, 24), 49, None, "1 < 49 frames"),
        ((np.zeros(1), 60.0, 0.001), 49, 8, "1 < 49 frames"),
    ],
)
def test_too_short(video: tuple[np.ndarray, float, float], frames: int, fps: float, reason: str) -> None:
    with pytest.raises(TooShortError) as caught:
        picked(video, frames, fps)
    assert caught.value.message == reason


def test_just_long_enough() -> None:
    assert picked(steady(49, 24), 49, None).indices == tuple(range(49))
    assert picked(steady(49, 24), 49, 24).indices == tuple(range(49))
    assert picked(steady(145, 24), 49, 8).indices == tuple(range(0, 145, 3))
    with pytest.raises(TooShortError, match="48 < 49"):
        picked(steady(144, 24), 49, 8)
    rounded = np.round(np.arange(144) / 24, 3)
    with pytest.raises(TooShortError, match="48 < 49"):
        picked((rounded, 6.001, 0.001), 49, 8)  # a millisecond of rounding is no frame


def test_padding_repeats_the_last_frame() -> None:
    result = picked(steady(20, 24), 25, None, short="pad")
    assert result == Picked((*range(20), 19, 19, 19, 19, 19), 5, 0)
    by_time = picked(steady(24, 24), 17, 8, short="pad")
    assert by_time == Picked((0, 3, 6, 9, 12, 15, 18, 21, *[23] * 9), 9, 0)
    with pytest.raises(TooShortError):
        picked(steady(1, 24), 9, None, short="pad")  # a picture is no video


def test_a_slow_source_repeats_frames() -> None:
    result = picked(steady(10, 4), 17, 8)
    assert result == Picked((0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8), 0, 8)


@given(
    gaps=st.lists(st.integers(1, 400), min_size=2, max_size=200),
    last=st.integers(1, 400),
    frames=st.integers(1, 12).map(lambda n: 8 * n + 1),
    fps=st.one_of(st.none(), st.floats(1, 60)),
    share=st.sampled_from([Window(), Window("centre"), *(Window("part", i, 3) for i in range(3))]),
)
def test_whatever_is_picked_lies_within(
    gaps: list[int], last: int, frames: int, fps: float | None, share: Window
) -> None:
    times = np.cumsum([0, *gaps]) / 1000
    duration = float(times[-1]) + last / 1000
    result = picked((times, duration, 0.001), frames, fps, window=share, short="pad")
    assert len(result.indices) == frames
    assert all(0 <= a <= b < len(times) for a, b in pairwise(result.indices))
    own = result.indices[: frames - result.padded]
    if result.padded:
        assert set(result.indices[len(own) - 1 :]) == {len(times) - 1} or fps is not None
        assert result.indices[-1] == len(times) - 1
    if fps is None:
        assert all(b - a == 1 for a, b in pairwise(own))
    else:
        begin = max(0.0, duration - frames / fps) * share.share()
        shown_until = [*times[1:], np.inf]
        for k, index in enumerate(own):
            wanted = begin + k / fps
            assert times[index] <= wanted + 0.0011
            assert shown_until[index] > wanted + 0.0009
