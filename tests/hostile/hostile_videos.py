"""Hostile videos, each read in a process that may die: a decoder in C can be brought down by its input.

``python hostile_videos.py FOLDER FIRST COUNT`` reads variants of the videos in ``FOLDER`` and prints one JSON line
before and one after each.
"""

from __future__ import annotations

import json
import logging
import os
import random
import selectors
import subprocess
import sys
from pathlib import Path

from hostile_guard import Guard, HangError, little_memory
from hostile_kit import Outcome
from hostile_mutations import mutate_bytes

from cogcache.errors import CogcacheError

__all__ = ["make_videos", "run_videos"]

HANG_SECONDS = 120
_FRAMES = 12
_ATOMS = (
    *(
        b"stts",
        b"ctts",
        b"stsz",
        b"stsc",
        b"stco",
        b"stss",
        b"stsd",
        b"avcC",
        b"tkhd",
        b"mdhd",
        b"mvhd",
        b"elst",
    ),
    *(
        b"hdlr",
        b"moov",
        b"mdat",
        b"trak",
        b"dref",
        b"ftyp",
        b"\x16\x54\xae\x6b",
        b"\x1f\x43\xb6\x75",
        b"\xa3",
        b"\xb0\x81",
    ),
    *(b"idx1", b"strh", b"strf", b"\x00\x00\x01\x67", b"\x00\x00\x00\x01", b"\x47\x40", b"\x2c\x00\x00"),
)
_LEADS_AWAY = (
    *(
        b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\n",
    ),
    *(
        b"RTSP://localhost/x",
        b"<?xml version='1.0'?><MPD></MPD>",
        b"[playlist]\nFile1=/etc/passwd\n",
        b"\0" * 5000,
        b"\x1a\x45\xdf\xa3",
    ),
)


def make_videos(folder: Path) -> Path:
    """Short videos in several containers and codecs."""
    import numpy as np
    from making_videos import write_video

    def picture(number: int) -> np.ndarray:
        return np.full((48, 64, 3), 10 + 20 * number % 256, np.uint8)

    def write(name: str, codec: str, **options: object) -> None:
        write_video(folder / name, codec, frames=_FRAMES, fps=8, image=picture, **options)

    for name in ("h264.mp4", "h264.mkv", "h264.ts", "h264.mov", "h264.flv", "h264.avi"):
        write(name, "libx264", options={"g": "4", "bf": "2"})
    write("hevc.mp4", "libx265", options={"x265-params": "log-level=none:keyint=4:pools=none"})
    write("vp9.webm", "libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"})
    write("mpeg4.avi", "mpeg4")
    write("ffv1.mkv", "ffv1")
    write("gif.gif", "gif", pix_fmt="rgb8")
    return folder


def spoil(data: bytes, source: random.Random) -> bytes:
    """A video with one damage: anywhere, or in the numbers behind one of the marks of its container."""
    if source.random() < 0.03:
        return source.choice(_LEADS_AWAY)
    if source.random() < 0.3:
        return mutate_bytes(data, source)
    marks = [mark for mark in _ATOMS if mark in data]
    if not marks:
        return mutate_bytes(data, source)
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 3))):
        at = data.index(source.choice(marks)) + source.choice((-4, *range(0, 48, 4)))
        number = source.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x4000, source.getrandbits(32)))
        changed[max(0, at) : max(0, at) + 4] = number.to_bytes(4, "big")
    return bytes(changed)


def run_videos(folder: Path, count: int, first: int = 0) -> Outcome:
    """Read ``count`` variants; a process that dies or hangs is a finding, and the next one goes on behind it."""
    outcome = Outcome("videos")
    seed, end = first, first + count
    while seed < end and len(outcome.findings) < 20:
        seed = _run(folder, seed, end, outcome)
    return outcome


def _run(folder: Path, first: int, end: int, outcome: Outcome) -> int:
    """One process; gives the seed to go on with."""
    command = [sys.executable, __file__, str(folder), str(first), str(end - first)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    seed = first
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as process,
        selectors.DefaultSelector() as waiting,
    ):
        assert process.stdout
        waiting.register(process.stdout, selectors.EVENT_READ)
        rest = b""
        while waiting.select(HANG_SECONDS):
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                seed = _note(json.loads(line), outcome)
        else:
            process.kill()
            outcome.findings.append(f"seed {seed}: no end after {HANG_SECONDS} s")
        process.wait()
    if process.returncode and process.returncode != -9:
        outcome.cases += 1
        outcome.findings.append(f"seed {seed}: the process ended with {process.returncode}")
    return seed + 1


def _note(said: dict[str, object], outcome: Outcome) -> int:
    seed = int(str(said["seed"]))
    if "kind" in said:
        outcome.cases += 1
        outcome.accepted += said["kind"] == ""
        if said["kind"]:
            outcome.refused += 1
            outcome.kinds[str(said["kind"])] += 1
        if said["finding"]:
            outcome.findings.append(f"seed {seed}: {said['finding']}")
    return seed


def main(folder: Path, first: int, count: int) -> None:
    """Body of the process."""
    import av
    import decord

    from cogcache.geometry import Size
    from cogcache.video import ClipRequest, load_clip, load_first_frame

    logging.disable()
    av.logging.set_level(av.logging.PANIC)
    made = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    work = folder / "work"
    work.mkdir(exist_ok=True)
    guard = Guard(work)
    for path in sorted(folder.iterdir()):  # everything is imported and warm before memory is limited
        if path.is_file():
            load_first_frame(path, ClipRequest(9, Size(32, 48)))
    decord.logging.set_level(decord.logging.QUIET)
    with little_memory():
        for seed in range(first, first + count):
            source = random.Random(f"videos {seed}")
            print(json.dumps({"seed": seed}), flush=True)
            name = source.choice(sorted(made))
            path = work / name
            path.write_bytes(spoil(made[name], source))
            reader = source.choice(("auto", "auto", "pyav", "decord"))
            request = ClipRequest(9, Size(32, 48), fps=source.choice((None, 8.0, 3.0)), reader=reader)
            read = source.choice((load_clip, load_clip, load_first_frame))
            kind = finding = ""
            try:
                with guard.watching():
                    read(path, request)
            except CogcacheError as error:
                kind = type(error).__name__
                finding = "" if str(error).strip() else f"{kind} without a text"
            except (Exception, HangError) as error:
                kind = type(error).__name__
                finding = f"{name} {reader}: {kind}: {error!s:.200}"
            finding = "; ".join(filter(None, (finding, *guard.breaches)))
            guard.breaches.clear()
            print(json.dumps({"seed": seed, "kind": kind, "finding": finding}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
