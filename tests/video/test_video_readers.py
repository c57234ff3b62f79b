"""The contract of a video reader, run on every format and by both readers; and the choice between them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from making_videos import HEIGHT, WIDTH, X264, ffmpeg, numbers, picture, write_video

from cogcache.errors import VideoError
from cogcache.geometry import Size
from cogcache.video import open_video
from cogcache.video.choose import ReaderChoice

Make = Callable[[Path], Path]

VFR_TIMES = np.cumsum([0, *random.Random(1).choices([0.033, 0.05, 0.185, 0.1], k=59)]).round(3).tolist()
X265 = "keyint=12:min-keyint=12:bframes=3:log-level=none:pools=none:frame-threads=1:open-gop="


def video(name: str, codec: str = "libx264", **settings: object) -> tuple[str, Make]:
    return name, lambda folder: write_video(folder / name, codec, **settings)


def copied(name: str, source: str, *arguments: object) -> tuple[str, Make]:
    """``source`` copied by the ffmpeg program without re-encoding."""

    def make(folder: Path) -> Path:
        before, after = (arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :])
        ffmpeg(*before, "-i", FORMATS[source](folder), *after, "-c", "copy", folder / name)
        return folder / name

    return name, make


FORMATS: dict[str, Make] = dict(
    [
        video("h264.mp4", options=X264),
        video("h264.mkv", options=X264),
        video("h264.mov", options=X264),
        video("one_keyframe.mp4", options=X264 | {"g": "1000"}),
        video(
            "pyramid.mp4", options={"crf": "10", "x264-params": "keyint=15:bframes=8:b-pyramid=normal:ref=6"}
        ),
        video("opengop.mp4", options=X264 | {"x264-params": "open-gop=1"}),
        video("vfr.mp4", options=X264, times_s=VFR_TIMES),
        video("vfr.mkv", options=X264, times_s=VFR_TIMES, tick=Fraction(1, 1000)),
        video("hevc_closed.mp4", "libx265", options={"x265-params": X265 + "0", "crf": "10"}),
        video("hevc_open.mp4", "libx265", options={"x265-params": X265 + "1", "crf": "10"}),
        video("vp9.webm", "libvpx-vp9", options={"g": "12", "crf": "10", "b": "0", "deadline": "realtime"}),
        video(
            "vp8.webm",
            "libvpx",
            options={"auto-alt-ref": "1", "lag-in-frames": "16", "b": "1M", "cpu-used": "5"},
        ),
        video(
            "av1.mp4", "libsvtav1", options={"g": "12", "crf": "10", "preset": "6", "svtav1-params": "lp=1"}
        ),
        video("mpeg4.avi", "mpeg4", options={"q": "2", "g": "12", "b": "2M"}),
        video("h264.avi", options=X264 | {"bf": "0"}),
        video("mjpeg.avi", "mjpeg", pix_fmt="yuvj420p"),
        video("mpeg2.mpg", "mpeg2video", options={"bf": "2", "b": "4M"}),
        video("h264.ts", options=X264),
        video("h264.flv", options=X264),
        video("prores.mov", "prores_ks", pix_fmt="yuv422p10le"),
        video("raw.h264", options=X264),
        copied("cut.mp4", "h264.mp4", "-ss", "0.7", "-t", "1", "--"),
        copied("cut_hevc.mp4", "hevc_open.mp4", "-ss", "0.7", "--"),
        copied("fragmented.mp4", "h264.mp4", "--", "-movflags", "frag_keyframe+empty_moov"),
        copied("streamed.mkv", "h264.mp4", "--", "-live", "1"),
    ]
)
DECORD = {
    *("h264.mp4", "h264.mkv", "h264.mov", "one_keyframe.mp4", "pyramid.mp4", "vfr.mp4", "vfr.mkv"),
    *("hevc_closed.mp4", "vp9.webm", "fragmented.mp4"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Path of a format by name, made once."""
    folder = tmp_path_factory.mktemp("videos")
    return functools.cache(lambda name: FORMATS[str(name)](folder))


COUNTS = {"cut.mp4": 26, "cut_hevc.mp4": 43}


def first_number(name: str) -> int:
    return 17 if name in COUNTS else 0


@pytest.mark.parametrize("name", FORMATS)
def test_decord_reads_what_it_is_trusted_with(made: Make, name: str) -> None:
    with open_video(made(name), "auto") as reader:
        assert reader.name == "pyav"
    if name in DECORD:
        with open_video(made(name), "decord") as reader:
            assert reader.name == "decord"
    else:
        with pytest.raises(VideoError):
            open_video(made(name), "decord")


READINGS = [("pyav", name) for name in FORMATS] + [("decord", name) for name in sorted(DECORD)]


@pytest.mark.parametrize(("choice", "name"), READINGS)
def test_frames_and_times(made: Make, name: str, choice: str) -> None:
    with open_video(made(name), choice) as reader:
        count = COUNTS.get(name, 60)
        assert (reader.info.frames, len(reader.timestamps)) == (count, count)
        frames = reader.read(range(count))
        assert (frames.dtype, frames.shape) == (np.uint8, (count, HEIGHT, WIDTH, 3))
        first = first_number(name)
        assert numbers(frames) == list(range(first, first + count))
        assert np.abs(frames[0].astype(int) - picture(first)).mean() < 6
        rate = 25 if name == "raw.h264" else 24  # a raw stream without timing: FFmpeg's default
        times = VFR_TIMES if name.startswith("vfr") else np.arange(count) / rate
        assert np.abs(reader.timestamps - times).max() < 0.00101
        if not name.startswith("vfr"):
            assert reader.info.duration_s == pytest.approx(count / rate, abs=0.0011)
        assert reader.info.fps == pytest.approx(count / reader.info.duration_s)


@pytest.mark.parametrize(("choice", "name"), READINGS)
def test_any_choice_of_frames(made: Make, name: str, choice: str) -> None:
    """Seeking never shifts a frame (decord's does, on open-GOP streams)."""
    rng = random.Random(name)
    first = first_number(name)
    for _ in range(6):
        with open_video(made(name), choice) as reader:
            indices = rng.choices(range(reader.info.frames), k=rng.randrange(1, 8))
            assert numbers(reader.read(indices)) == [first + index for index in indices]
            step = rng.randrange(1, 9)
            indices = list(range(rng.randrange(reader.info.frames), reader.info.frames, step))
            assert numbers(np.stack(list(reader.stream(indices)))) == [first + index for index in indices]


@pytest.mark.parametrize("name", sorted(DECORD))
def test_both_readers_give_the_same_pixels(made: Make, name: str) -> None:
    with open_video(made(name), "decord") as one, open_video(made(name), "pyav") as other:
        assert np.array_equal(one.read([3, 20, 47]), other.read([3, 20, 47]))


def test_decord_by_name_is_refused_where_it_is_wrong(made: Make) -> None:
    for name, reason in {
        "av1.mp4": "codec av1",
        "opengop.mp4": "open GOP",
        "cut.mp4": "container holds 26",
    }.items():
        with pytest.raises(VideoError, match=reason):
            open_video(made(name), "decord")


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [False, True])
def test_pictures_come_upright(made: Make, tmp_path: Path, turn: int, mirror: bool) -> None:
    path = tmp_path / "turned.mp4"
    flags = ["-display_rotation", turn, *(["-display_hflip"] if mirror else [])]
    ffmpeg(*flags, "-i", made("h264.mp4"), "-c", "copy", path)
    raw = ffmpeg("-i", path, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    choice: ReaderChoice = "pyav" if mirror else "decord"
    with open_video(path, choice) as reader, open_video(path, "pyav") as other:
        shown = reader.info.display
        truth = np.frombuffer(raw, np.uint8).reshape(shown.height, shown.width, 3)
        assert shown == (Size(WIDTH, HEIGHT) if turn % 180 else Size(HEIGHT, WIDTH))
        assert (reader.info.rotation, reader.info.mirrored) == (turn, mirror)
        assert np.array_equal(reader.read([0])[0], truth)
        assert np.array_equal(other.read([0])[0], truth)
        if not mirror:
            upright = np.rot90(picture(0), turn // 90)
            assert np.abs(truth.astype(int) - upright).mean() < 6


@pytest.mark.parametrize(("turn", "display"), [(0, Size(96, 190)), (90, Size(190, 96))])
def test_display_size_of_anamorphic_video(tmp_path: Path, turn: int, display: Size) -> None:
    def wide(stream: object) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(32, 27)

    path = write_video(tmp_path / "sar.mp4", frames=9, setup=wide)
    ffmpeg("-display_rotation", turn, "-i", path, "-c", "copy", tmp_path / "turned.mp4")
    with open_video(tmp_path / "turned.mp4", "auto") as reader:
        assert reader.info.sample_aspect_ratio == Fraction(32, 27)
        assert reader.info.display == display
        assert reader.info.stored == Size(96, 160)


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p", "yuv422p"])
@pytest.mark.parametrize("choice", ["decord", "pyav"])
def test_depth_and_chroma_keep_brightness(tmp_path: Path, pix_fmt: str, choice: str) -> None:
    path = write_video(tmp_path / "x.mp4", frames=9, options=X264, pix_fmt=pix_fmt)
    with open_video(path, choice) as reader:
        assert np.abs(reader.read([4])[0].astype(int) - picture(4)).mean() < 3


@pytest.mark.parametrize("space", ["bt709", "smpte170m"])
@pytest.mark.parametrize("colours", ["pc", "tv"])
def test_declared_colours_are_followed(tmp_path: Path, space: str, colours: str) -> None:
    path = tmp_path / "x.mp4"
    matrix = f"scale=in_color_matrix=bt601:out_color_matrix={space}:out_range={colours},format=yuv420p"
    source = write_video(tmp_path / "s.mkv", "ffv1", frames=9, pix_fmt="bgr0")
    tags = ["-colorspace", space, "-color_range", colours]
    ffmpeg("-i", source, "-vf", matrix, *tags, "-c:v", "libx264", "-crf", "8", path)
    for choice in ("decord", "pyav"):
        with open_video(path, choice) as reader:
            got = reader.read([4])[0].astype(int)
        # Flat areas away from edges: red and blue.
        assert np.abs(got[70:90, 5:30] - picture(4)[70:90, 5:30]).max() <= 8
        assert np.abs(got[70:90, 130:155] - picture(4)[70:90, 130:155]).max() <= 8


DAMAGE = ["h264.mp4", "h264.mkv", "vp9.webm", "av1.mp4", "mpeg4.avi", "prores.mov", "hevc_closed.mp4"]


@pytest.mark.parametrize("share", [0.5, 0.86, 0.99])
@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_were_cut_off_are_refused(made: Make, tmp_path: Path, name: str, share: float) -> None:
    """Though an index at the front is whole and the first frames decode."""
    data = faststart(made(name), tmp_path).read_bytes()
    path = tmp_path / f"cut{Path(name).suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    for choice in ("auto", "pyav"):
        with pytest.raises(VideoError, match=r"damaged: the file is cut off, \d+ bytes are missing"):
            open_video(path, choice)


def faststart(path: Path, folder: Path) -> Path:
    """MP4 and MOV with the index at the front, others as they are."""
    if path.suffix not in (".mp4", ".mov"):
        return path
    ffmpeg("-i", path, "-c", "copy", "-movflags", "faststart", folder / f"front{path.suffix}")
    return folder / f"front{path.suffix}"


def packet_span(path: Path, number: int) -> tuple[int, int]:
    """Where one packet lies in the file: first byte, size."""
    import av

    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return packets[number].pos, packets[number].size


def test_a_tail_that_was_never_written(made: Make, tmp_path: Path) -> None:
    """Found on opening, however far behind the window it lies."""
    data = bytearray(faststart(made("h264.mp4"), tmp_path).read_bytes())
    begin, _ = packet_span(tmp_path / "front.mp4", 50)
    data[begin:] = bytes(len(data) - begin)
    path = tmp_path / "zeros.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError, match="damaged: packet 50 holds only zeros"):
        open_video(path, "auto")


@pytest.mark.parametrize("choice", ["decord", "pyav"])
def test_damage_in_the_middle(made: Make, tmp_path: Path, choice: str) -> None:
    """decord would hand out the smeared pictures without a word."""
    data = bytearray(made("h264.mp4").read_bytes())
    begin, size = packet_span(made("h264.mp4"), 30)
    data[begin + size // 2] ^= 0xFF
    path = tmp_path / "bad.mp4"
    path.write_bytes(data)
    with pytest.raises(VideoError, match="damaged"), open_video(path, choice) as reader:
        reader.read([20, 33])


def test_fewer_packets_than_declared(made: Make, tmp_path: Path) -> None:
    """The index promises 60 frames; the media box was closed early, so no length gives it away."""
    data = bytearray(faststart(made("h264.mp4"), tmp_path).read_bytes())
    box = data.index(b"mdat") - 4
    keep, _ = packet_span(tmp_path / "front.mp4", 40)
    data[box : box + 4] = (keep - box).to_bytes(4, "big")
    path = tmp_path / "short.mp4"
    path.write_bytes(data[:keep])
    with pytest.raises(VideoError, match="damaged: 60 frames declared, 40 found"):
        open_video(path, "auto")


def test_files_that_are_no_video(tmp_path: Path) -> None:
    import av

    garbage = tmp_path / "garbage.mp4"
    garbage.write_bytes(random.Random(0).randbytes(5000))
    empty = tmp_path / "empty.mp4"
    empty.touch()
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXTINF:1\n{garbage}\n")
    picture_file = tmp_path / "picture.mp4"
    picture_file.write_bytes(ffmpeg("-f", "lavfi", "-i", "color", "-frames:v", 1, "-f", "apng", "-"))
    reasons = {
        garbage: "not a video",
        empty: "empty file",
        sound: "no video stream",
        playlist: "not a video",
        picture_file: "not a video",
        tmp_path: "not a file",
        tmp_path / "missing.mp4": "does not exist",
    }
    for path, reason in reasons.items():
        with pytest.raises(VideoError, match=reason):
            open_video(path, "auto")
