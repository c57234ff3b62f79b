"""Which clips there are, and what their captions say: from a data root to a list of :class:`ClipItem`.

Three layouts, told apart by what the data root holds (or named):

``lists``
    ``prompts.txt`` and ``videos.txt``, matched by line number; optionally ``images.txt``.
``metadata``
    ``metadata.jsonl`` or ``metadata.csv`` with ``file_name``, ``text`` and optionally ``image``; other
    columns are ignored.
``sidecar``
    ``clip.txt`` beside ``clip.mp4``, in any folder below the root, sorted by path.

All files are UTF-8; a byte order mark and CRLF are fine. A blank line is a mistake, never skipped: skipping
it would shift every caption after it. All mistakes of a data root are reported at once. A video may be
listed more than once, with different captions.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal

from cogcache.errors import DatasetError
from cogcache.precompute.listing import Row, read_lists, read_metadata
from cogcache.precompute.paths import ClipItem, Locator
from cogcache.precompute.sidecar import count_pairs, find_videos, read_sidecars

__all__ = ["ClipItem", "DatasetKind", "find_clips"]

DatasetKind = Literal["lists", "metadata", "sidecar"]

_WAYS = (
    "Give prompts.txt and videos.txt, or metadata.jsonl or metadata.csv (file_name, text), "
    "or a .txt beside each video."
)


def find_clips(
    data_root: Path, dataset: Literal["auto", "lists", "metadata", "sidecar"], allow_outside: bool
) -> list[ClipItem]:
    """Find the clips of a data root, in the order listed (sidecar: sorted by path).

    Args:
        data_root: Folder that holds the lists; listed paths are relative to it.
        dataset: Which layout; ``auto`` takes the one that is there.
        allow_outside: Accept absolute paths, ``..`` and links that lead out of ``data_root``.

    Raises:
        DatasetError: with every mistake found, each naming file and line.
    """
    _check_root(data_root)
    root = data_root.resolve()
    kind = _detect(data_root, root, allow_outside) if dataset == "auto" else dataset
    mistakes: list[str] = []
    if kind == "sidecar":
        items = read_sidecars(root, allow_outside, mistakes)
    else:
        rows = (read_lists if kind == "lists" else read_metadata)(root, mistakes)
        items = _locate(rows, Locator(root, allow_outside), mistakes)
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise DatasetError(f"{data_root} has {count} in its lists:", mistakes)
    if not items:
        raise DatasetError(f"{data_root} lists no clips.", hint=_WAYS)
    return items


def _check_root(data_root: Path) -> None:
    try:
        if not data_root.exists():
            raise DatasetError(f"The data root {data_root} does not exist.", hint="Check the path.")
        if not data_root.is_dir():
            raise DatasetError(
                f"The data root {data_root} is not a folder.", hint="Give the folder of the lists."
            )
        empty = next(data_root.iterdir(), None) is None
    except OSError as error:
        raise DatasetError(f"The data root {data_root} cannot be read: {error.strerror}.") from None
    if empty:
        raise DatasetError(f"The data root {data_root} is empty.", hint=_WAYS)


def _detect(shown: Path, root: Path, allow_outside: bool) -> DatasetKind:
    """The one layout that ``root`` holds.

    Raises:
        DatasetError: if there is none, or more than one.
    """
    found: dict[DatasetKind, str] = {}
    files: dict[DatasetKind, tuple[str, str]] = {
        "lists": ("prompts.txt", "videos.txt"),
        "metadata": ("metadata.jsonl", "metadata.csv"),
    }
    for kind, names in files.items():
        present = [name for name in names if (root / name).exists()]
        if present:
            found[kind] = " and ".join(present)
    pairs = count_pairs(root, allow_outside)
    if pairs:
        found["sidecar"] = f"{pairs} videos with a .txt beside them"
    if len(found) > 1:
        kinds = "; ".join(f"{kind} ({what})" for kind, what in found.items())
        raise DatasetError(
            f"{shown} holds more than one kind of list: {kinds}.",
            hint=f"Say which one with --dataset {' or '.join(found)}.",
        )
    if not found:
        videos = len(find_videos(root, allow_outside))
        raise DatasetError(f"{shown} holds {videos} videos but no captions for them.", hint=_WAYS)
    return next(iter(found))


def _locate(rows: list[Row], locator: Locator, mistakes: list[str]) -> list[ClipItem]:
    items = []
    for row in rows:
        try:
            path, _ = locator.find(row.video)
        except DatasetError as error:
            mistakes.append(f"{row.where}: {error.message}")
            continue
        try:
            image = locator.find(row.image)[1] if row.image else None
        except DatasetError as error:
            mistakes.append(f"{row.where.replace('videos.txt', 'images.txt')}: {error.message}")
            continue
        items.append(ClipItem(path, PurePosixPath(row.video).as_posix(), row.caption, image))
    return items
