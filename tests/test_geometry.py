"""Frame counts, picture sizes and how a picture is fitted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogcache.errors import GeometryError
from cogcache.geometry import FitPlan, Size, check_frames, check_size, latent_frames, parse_size, plan_fit

lengths = st.integers(1, 5000)
targets = st.integers(1, 100).map(lambda n: 16 * n)


@given(st.integers(-100, 10_000))
def test_frames_are_8n_plus_1(frames: int) -> None:
    if frames >= 1 and (frames - 1) % 8 == 0:
        assert check_frames(frames) == frames
        assert latent_frames(frames) == 2 * ((frames - 1) // 8) + 1
        return
    with pytest.raises(GeometryError) as raised:
        check_frames(frames)
    below, above = (int(word.strip(".")) for word in raised.value.hint.split() if word.strip(".").isdigit())
    assert below % 8 == above % 8 == 1
    assert above - below == 8
    assert below < max(frames, 2) < above or frames < 1


@pytest.mark.parametrize(
    ("frames", "near"), [(48, "41 and 49"), (50, "49 and 57"), (2, "1 and 9"), (0, "1 and 9")]
)
def test_the_two_nearest_counts_are_named(frames: int, near: str) -> None:
    with pytest.raises(GeometryError, match=near):
        check_frames(frames)


def test_sizes_are_read() -> None:
    assert parse_size("480x720") == Size(480, 720) == parse_size(" 480 X 720 ")
    assert str(Size(480, 720)) == "480x720"
    for text in (
        "",
        "480",
        "480x",
        "x720",
        "480*720",
        "-480x720",
        "480x720x3",
        "4.8x7",
        "0x720",
        "9" * 9 + "x1",
    ):
        with pytest.raises(GeometryError, match="is not a size"):
            parse_size(text)


@given(lengths, lengths)
def test_sizes_are_multiples(height: int, width: int) -> None:
    size = Size(height, width)
    if height % 16 == width % 16 == 0:
        assert check_size(size, 16) == size
        return
    with pytest.raises(GeometryError) as raised:
        check_size(size, 16)
    near = parse_size(raised.value.hint.split()[-1].strip("."))
    assert check_size(near, 16) == near
    assert abs(near.height - height) <= 15
    assert abs(near.width - width) <= 15


@given(lengths, lengths, targets, targets)
def test_cover_fills_and_pad_shows_all(height: int, width: int, to_height: int, to_width: int) -> None:
    display, target = Size(height, width), Size(to_height, to_width)
    cover, pad = plan_fit(display, target, "cover"), plan_fit(display, target, "pad")
    assert cover.resized.height >= to_height
    assert cover.resized.width >= to_width
    assert to_height == cover.resized.height or to_width == cover.resized.width
    assert pad.resized.height <= to_height
    assert pad.resized.width <= to_width
    assert to_height == pad.resized.height or to_width == pad.resized.width
    assert min(cover.top, cover.left) >= 0 >= max(pad.top, pad.left)
    for plan in (cover, pad):  # centred to half a pixel, nothing beyond the edges
        assert plan.target == target
        assert abs(2 * plan.top - (plan.resized.height - to_height)) <= 1
        assert abs(2 * plan.left - (plan.resized.width - to_width)) <= 1
    assert plan_fit(display, target, "stretch") == FitPlan(target, target, 0, 0)


def test_aspect_ratio_is_kept() -> None:
    assert plan_fit(Size(1080, 1920), Size(480, 720), "cover") == FitPlan(
        Size(480, 853), Size(480, 720), 0, 66
    )
    assert plan_fit(Size(1080, 1920), Size(480, 720), "pad") == FitPlan(
        Size(405, 720), Size(480, 720), -38, 0
    )
