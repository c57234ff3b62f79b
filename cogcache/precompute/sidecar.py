"""Reader of the sidecar layout: ``clip.txt`` beside ``clip.mp4``.

Hidden files and folders (a leading dot) are passed over. So are texts that are plainly not captions, as long
as no video shares their name: README, LICENSE, LICENCE, COPYING, NOTICE, ATTRIBUTION, CHANGELOG, CREDITS and
requirements anywhere, and the lists of the other layouts in the root. Any other text without a video is a
mistake, because it is most likely a misspelt name.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from cogcache.errors import DatasetError
from cogcache.precompute.listing import is_text, read_text
from cogcache.precompute.paths import ClipItem, Locator

__all__ = ["VIDEO_SUFFIXES", "count_pairs", "find_videos", "read_sidecars"]

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("3gp", "avi", "flv", "gif", "m2ts", "m2v", "m4v", "mkv", "mov"),
        *("mp4", "mpeg", "mpg", "mts", "mxf", "ogv", "ts", "webm", "wmv"),
    )
)
_NOT_CAPTIONS = frozenset(
    (
        *("attribution", "changelog", "copying", "credits", "licence", "license"),
        *("notice", "readme", "requirements"),
    )
)
_LISTS = frozenset(("prompts.txt", "videos.txt", "images.txt"))


def find_videos(root: Path, allow_outside: bool) -> list[PurePosixPath]:
    """All videos below ``root``, by suffix, relative and sorted."""
    return sorted(path for path in _walk(root, allow_outside, []) if path.suffix.lower() in VIDEO_SUFFIXES)


def count_pairs(root: Path, allow_outside: bool) -> int:
    """How many videos below ``root`` have a text beside them."""
    videos, captions = _group(_walk(root, allow_outside, []))
    return len(videos.keys() & captions.keys())


def read_sidecars(root: Path, allow_outside: bool, mistakes: list[str]) -> list[ClipItem]:
    """Pair every video below ``root`` with the text beside it, sorted by path.

    Line breaks within a caption become spaces. Mistakes are added to ``mistakes``.
    """
    videos, captions = _group(_walk(root, allow_outside, mistakes))
    for stem in sorted(captions.keys() - videos.keys()):
        if not _is_no_caption(captions[stem]):
            mistakes.append(f"{captions[stem]}: no video of that name beside it")
    locator = Locator(root, allow_outside)
    pairs = (_pair(locator, found, captions.get(stem), mistakes) for stem, found in videos.items())
    return sorted((item for item in pairs if item is not None), key=lambda item: item.source)


def _group(
    paths: Iterable[PurePosixPath],
) -> tuple[dict[str, list[PurePosixPath]], dict[str, PurePosixPath]]:
    """Videos and texts by path without suffix, accents composed (NFC) so that either spelling matches."""
    videos: dict[str, list[PurePosixPath]] = defaultdict(list)
    captions: dict[str, PurePosixPath] = {}
    for path in sorted(paths):
        stem = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
        if path.suffix.lower() in VIDEO_SUFFIXES:
            videos[stem].append(path)
        elif path.suffix.lower() == ".txt":
            captions[stem] = path
    return videos, captions


def _pair(
    locator: Locator, videos: list[PurePosixPath], caption: PurePosixPath | None, mistakes: list[str]
) -> ClipItem | None:
    if caption is None:
        mistakes += [f"{video}: no caption beside it ({video.stem}.txt)" for video in videos]
        return None
    if len(videos) > 1:
        mistakes.append(f"{caption} is beside {' and '.join(v.name for v in videos)}: rename all but one")
        return None
    try:
        path, source = locator.find(str(videos[0]))
        words = read_text(locator.find(str(caption))[0]).split()
    except DatasetError as error:
        mistakes.append(f"{caption.parent / videos[0].stem}: {error.message}")
        return None
    if not words:
        mistakes.append(f"{caption} is empty")
        return None
    return ClipItem(path, source, " ".join(words))


def _is_no_caption(path: PurePosixPath) -> bool:
    return path.stem.lower() in _NOT_CAPTIONS or path.as_posix() in _LISTS


def _walk(root: Path, allow_outside: bool, mistakes: list[str]) -> Iterator[PurePosixPath]:
    """Every file below ``root`` that is not hidden, relative; each real folder once, so links cannot loop."""
    seen = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        real = folder.resolve()
        shown = folder.relative_to(root).as_posix()
        if not allow_outside and not real.is_relative_to(root):
            mistakes.append(f"{shown} links out of the data root (--allow-outside accepts this)")
            continue
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            mistakes.append(f"{shown} cannot be read: {error.strerror}")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not is_text(entry.name):
                mistakes.append(f"{shown}/{entry.name!a}: the file name is not UTF-8")
            elif _is_folder(entry):
                pending.append(folder / entry.name)
            else:
                yield PurePosixPath((folder / entry.name).relative_to(root))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself; reading it says so
        return False
