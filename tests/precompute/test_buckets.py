"""Which bucket a clip goes in, and which buckets ``auto`` makes.

Mutations tried, each caught: no upscaling in the waste; kept frames not counted; ties to the smaller bucket; a fit
bound of the other side; buckets dropped though their clips fit nowhere else.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogcache.errors import GeometryError
from cogcache.geometry import Bucket, FitMode, Size, parse_bucket
from cogcache.precompute.buckets import ClipShape, Placing, choose_buckets, place, waste
from cogcache.variants import Variant

VARIANT = Variant(
    in_channels=16, latent_channels=16, num_layers=1, num_attention_heads=1, attention_head_dim=64, patch_size=2,
    patch_size_t=None, positions="rope", ofs=False, sample_frames=49, sample_height=60, sample_width=90,
    text_length=226, text_dim=8, spatial_factor=8, temporal_factor=4, scaling_factor=0.7, invert_scale_latents=False,
    snr_shift_scale=1.0, num_train_timesteps=1000,
)  # fmt: skip

sides = st.integers(1, 60).map(lambda n: 16 * n)
buckets = st.builds(Bucket, st.integers(0, 12).map(lambda n: 8 * n + 1), sides, sides)
bucket_sets = st.sets(buckets, min_size=1, max_size=6)
displays = st.builds(Size, st.integers(1, 4000), st.integers(1, 4000))
shapes = st.builds(ClipShape, displays, st.integers(1, 400), st.just(value=False))
placings = st.builds(
    Placing, st.sampled_from(["cover", "pad", "stretch"]), st.sampled_from(["fail", "pad"]), st.integers(1, 4)
)


def reference(shape: ClipShape, bucket: Bucket, placing: Placing) -> Fraction:
    """The waste as README words say it, in whole numbers."""
    height, width = shape.display.height, shape.display.width
    ratios = Fraction(bucket.height, height), Fraction(bucket.width, width)
    scale = max(ratios) if placing.fit == "cover" else min(ratios)
    seen = Fraction(
        min(bucket.height, height * scale) * min(bucket.width, width * scale)
    )  # target pixels shown
    kept = seen / scale**2 / (height * width)
    used = seen / (bucket.height * bucket.width) * min(1, 1 / scale**2)
    frames = Fraction(shape.frames, placing.windows)
    return 1 - kept * used * min(1, bucket.frames / frames) * min(1, frames / bucket.frames)


@given(shapes, bucket_sets, placings)
def test_no_bucket_that_is_possible_wastes_less(
    shape: ClipShape, among: set[Bucket], placing: Placing
) -> None:
    possible = [b for b in among if placing.short == "pad" or b.frames <= shape.frames]
    chosen = place(shape, among, placing)
    if not possible:
        assert chosen is None
        return
    assert chosen in possible
    wastes = {bucket: float(reference(shape, bucket, placing)) for bucket in possible}
    least = min(wastes.values())
    assert wastes[chosen] == pytest.approx(least, abs=2e-9)
    equal = [bucket for bucket in possible if wastes[bucket] == wastes[chosen]]
    assert chosen.volume == max(bucket.volume for bucket in equal)
    for bucket in possible:
        found = waste(shape, bucket, placing)
        assert found is not None
        assert -1e-12 <= found < 1
        assert found == pytest.approx(wastes[bucket], abs=1e-9)


@given(shapes, st.lists(buckets, min_size=1, max_size=6, unique=True), placings, st.randoms())
def test_neither_order_nor_losers_matter(
    shape: ClipShape, among: list[Bucket], placing: Placing, random: object
) -> None:
    chosen = place(shape, among, placing)
    shuffled = list(among)
    random.shuffle(shuffled)
    assert place(shape, shuffled + shuffled[:1], placing) == chosen
    for loser in set(among) - {chosen}:
        assert place(shape, [b for b in among if b != loser], placing) == chosen


@given(bucket_sets, st.sampled_from(["cover", "pad", "stretch"]))
def test_a_clip_of_a_buckets_shape_goes_there(among: set[Bucket], fit: FitMode) -> None:
    for bucket in among:
        shape = ClipShape(bucket.size, bucket.frames)
        assert waste(shape, bucket, Placing(fit)) == pytest.approx(0, abs=1e-12)
        assert place(shape, among, Placing(fit)) == bucket


def test_examples() -> None:
    """Worked out by hand."""
    wide, tall, short = Bucket(49, 480, 720), Bucket(49, 720, 480), Bucket(25, 480, 720)
    hd, phone = Size(1080, 1920), Size(1920, 1080)
    all_of_them = [wide, tall, short]
    assert place(ClipShape(hd, 60), all_of_them, Placing()) == wide
    assert place(ClipShape(phone, 60), all_of_them, Placing()) == tall
    assert place(ClipShape(hd, 48), all_of_them, Placing()) == short  # too short for 49
    assert place(ClipShape(hd, 48), all_of_them, Placing(short="pad")) == wide  # one frame is padded
    assert place(ClipShape(hd, 26), all_of_them, Placing(short="pad")) == short
    assert place(ClipShape(hd, 24), all_of_them, Placing()) is None
    assert place(ClipShape(hd, 1, still=True), all_of_them, Placing(short="pad")) is None
    assert place(ClipShape(hd, 1, still=True), [wide, Bucket(1, 480, 720)], Placing()) == Bucket(1, 480, 720)
    # Two sizes of one shape, both smaller than the source, waste the same.
    assert place(ClipShape(hd, 60), [wide, Bucket(49, 240, 360)], Placing()) == wide
    # 1920x1080 cropped to 3:2 keeps 27/32 of the width; 49 of 60 frames are taken.
    assert waste(ClipShape(hd, 60), wide, Placing()) == pytest.approx(1 - 27 / 32 * 49 / 60)
    assert waste(ClipShape(hd, 60), wide, Placing(fit="pad")) == pytest.approx(1 - 27 / 32 * 49 / 60)
    # Enlarged two times each way: a quarter of the values are from pixels of their own.
    assert waste(ClipShape(Size(240, 360), 49), wide, Placing()) == pytest.approx(0.75)
    # Two windows of a clip of 60: each has 30 frames of its own.
    assert place(ClipShape(hd, 60), all_of_them, Placing(windows=2)) == short


@pytest.mark.parametrize(
    "text", ["", "49", "480x720", "49x480x720x1", "0x16x16", "49x480xa", "-1x2x3", "1x2x3" * 9]
)
def test_what_is_no_bucket(text: str) -> None:
    with pytest.raises(GeometryError, match="is not a bucket"):
        parse_bucket(text)


@given(buckets)
def test_a_bucket_is_read_as_it_is_written(bucket: Bucket) -> None:
    assert parse_bucket(str(bucket)) == bucket == Bucket.of(bucket.frames, bucket.size)
    assert parse_bucket(f" {str(bucket).replace('x', ' X ')} ") == bucket


clip_lists = st.lists(
    st.tuples(
        st.builds(
            ClipShape,
            st.sampled_from(
                [Size(1080, 1920), Size(1920, 1080), Size(480, 480), Size(800, 1900), Size(480, 720)]
            ),
            st.integers(1, 120),
        ),
        st.integers(1, 6),
    ).map(lambda pair: [pair[0]] * pair[1]),
    max_size=12,
).map(lambda lists: [shape for part in lists for shape in part])


@given(clip_lists, placings, st.randoms())
def test_auto_suits_the_clips_and_the_model(clips: list[ClipShape], placing: Placing, random: object) -> None:
    chosen = choose_buckets(clips, VARIANT, placing)
    assert chosen == sorted(set(chosen))
    for bucket in chosen:
        VARIANT.check_clip(bucket.frames, bucket.size)
        assert bucket.frames in (9, 25, 49)
        assert bucket.size.height * bucket.size.width == pytest.approx(480 * 720, rel=0.05)
    shuffled = list(clips)
    random.shuffle(shuffled)
    assert choose_buckets(shuffled, VARIANT, placing) == chosen
    placed = [place(clip, chosen, placing) for clip in clips]
    for clip, bucket in zip(clips, placed, strict=True):
        assert (bucket is None) == (placing.short == "fail" and clip.frames < 9)
    if not any(placed):
        assert chosen == [Bucket(49, 480, 720)]
        return
    counts = {bucket: placed.count(bucket) for bucket in chosen}
    assert min(counts.values()) >= 1
    for bucket, count in counts.items():
        if len(chosen) > 6 or count < 4:  # dropped, unless some clip would then fit nowhere
            rest = set(chosen) - {bucket}
            assert any(
                b is not None and place(clip, rest, placing) is None
                for clip, b in zip(clips, placed, strict=True)
            )


def test_auto_of_a_mixed_folder() -> None:
    clips = [ClipShape(Size(1080, 1920), 100)] * 20 + [ClipShape(Size(1920, 1080), 100)] * 9
    clips += [ClipShape(Size(1080, 1920), 30)] * 5 + [ClipShape(Size(500, 500), 100)] * 2
    chosen = choose_buckets(clips, VARIANT, Placing())
    assert chosen == [Bucket(25, 448, 784), Bucket(49, 448, 784), Bucket(49, 784, 448)]


def test_auto_takes_only_what_the_model_allows() -> None:
    fixed = VARIANT.model_copy(update={"positions": "rope+learned"})
    clips = [ClipShape(Size(1920, 1080), 30)] * 9 + [ClipShape(Size(1080, 1920), 100)] * 9
    assert choose_buckets(clips, fixed, Placing()) == [Bucket(49, 480, 720)]
    small = VARIANT.model_copy(
        update={"patch_size_t": 2, "sample_height": 60, "sample_width": 90, "sample_frames": 81}
    )
    assert {b.size for b in choose_buckets(clips, small, Placing())} == {Size(480, 720)}
    assert {b.frames for b in choose_buckets(clips, small, Placing())} == {17, 81}
    brief = VARIANT.model_copy(update={"sample_frames": 17})
    stills = [ClipShape(Size(1080, 1920), 1, still=True)] * 9
    assert {b.frames for b in choose_buckets([*clips, *stills], brief, Placing())} == {17}
