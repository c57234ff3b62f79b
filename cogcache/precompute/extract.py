"""``cogcache extract-images``: the first frame of every listed video as a PNG, and ``images.txt`` beside the lists.

``encode`` needs neither: without ``images.txt`` it conditions on each clip's own first frame. This is for
looking at the first frames, for editing them, and for tools that expect the files. A picture remembers which video
it was taken from, so a run goes on where it was stopped, a changed video's picture is taken anew, and a
picture that somebody put there is left alone.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from cogcache.cache.files import FileLock, make_folder, write_atomic
from cogcache.cache.format import digest
from cogcache.config import ExtractImagesConfig
from cogcache.cores import reading_threads
from cogcache.errors import ConfigError, DatasetError, PartialFailureError, VideoError
from cogcache.hashing import content_id
from cogcache.precompute.listing import read_lines
from cogcache.precompute.paths import Locator
from cogcache.progress import Progress, say
from cogcache.video import ClipRequest, load_first_frame, open_video

__all__ = ["ExtractResult", "extract_images", "image_names"]

_LIST = "images.txt"
_MARK = "cogcache-source"
"""PNG text chunk: content id of the video that the picture was taken from."""


@dataclass(frozen=True)
class ExtractResult:
    """``written`` and ``kept`` count pictures; ``failures`` maps videos as listed to reasons."""

    images: list[str]
    written: int
    kept: int
    failures: dict[str, str]


def extract_images(config: ExtractImagesConfig) -> ExtractResult:
    """Write the pictures, then ``images.txt``, whose line N belongs to line N of ``videos.txt``.

    The list is written once every video has its picture: a shorter one would put later pictures to wrong videos.

    Raises:
        DatasetError: with every mistake in ``videos.txt``; if the data root has no such list; or if another
            ``images.txt`` is there and ``overwrite`` is not given.
        ConfigError: if ``output`` leaves the data root.
        StorageError: if something cannot be written.
        PartialFailureError: if videos could not be read; all other pictures are there.
    """
    root = config.data_root.resolve()
    sources, videos = _videos(config, root)
    folder = _folder(config, root)
    names = image_names(sources, folder)
    text = "".join(f"{name}\n" for name in names)
    _check_list(root / _LIST, text, overwrite=config.overwrite)
    make_folder(root / folder)
    lock = FileLock.acquire(root / folder / ".lock", wait=True)
    with lock or nullcontext():
        result = _extract(config, root, names, sources, videos)
        if not result.failures:
            write_atomic(root / _LIST, text.encode())
    _tell(config, result)
    return result


def image_names(sources: Sequence[str], folder: PurePosixPath) -> list[str]:
    """The picture's path for each video as listed, in order; equal only for equal videos.

    Folders are mirrored below the one that all videos share: ``videos/a.mp4`` alone gives ``images/a.png``, as in
    the reference, ``x/a.mp4`` and ``y/a.mp4`` give ``images/x/a.png`` and ``images/y/a.png``. Names that would
    still meet (``a.mp4``, ``a.mov``, ``A.mp4``) keep their suffix and get a piece of a hash. A video outside the
    data root is named by its own name and such a piece.
    """
    inside = {s: PurePosixPath(s) for s in sources if not _leaves(PurePosixPath(s))}
    shared = _shared_folder(path.parent for path in inside.values())
    mirrored = {s: path.relative_to(shared).with_suffix("") for s, path in inside.items()}
    mirrored |= {s: PurePosixPath(PurePosixPath(s).stem) for s in sources if s not in inside}
    times = Counter(str(path).casefold() for path in mirrored.values())
    names = {}
    for source, path in mirrored.items():
        alone = source in inside and times[str(path).casefold()] == 1
        name = path.name if alone else f"{PurePosixPath(source).name}-{digest(source)[:8]}"
        names[source] = (folder / path.parent / f"{name}.png").as_posix()
    return [names[source] for source in sources]


def _leaves(path: PurePosixPath) -> bool:
    return path.is_absolute() or ".." in path.parts


def _shared_folder(folders: Iterable[PurePosixPath]) -> PurePosixPath:
    """The deepest folder that holds all of ``folders``."""
    shared: PurePosixPath | None = None
    for folder in folders:
        while shared is not None and not folder.is_relative_to(shared):
            shared = shared.parent
        shared = folder if shared is None else shared
    return shared or PurePosixPath()


def _videos(config: ExtractImagesConfig, root: Path) -> tuple[list[str], list[Path]]:
    """The lines of ``videos.txt`` and the real files."""
    if not (root / "videos.txt").exists():
        raise DatasetError(
            f"{config.data_root} has no videos.txt, which images.txt would belong to.",
            hint="encode takes each clip's first frame by itself; "
            "other pictures can be named in the image column of metadata.jsonl.",
        )
    mistakes: list[str] = []
    lines = read_lines(root / "videos.txt", mistakes) or []
    locator, paths = Locator(root, config.allow_outside), []
    for number, line in enumerate(lines, 1):
        try:
            paths += [locator.find(line)[0]] if line else []
        except DatasetError as error:
            mistakes.append(f"videos.txt line {number}: {error.message}")
    if mistakes:
        raise DatasetError(f"{config.data_root} has mistakes in its list:", mistakes)
    return [PurePosixPath(line).as_posix() for line in lines], paths


def _folder(config: ExtractImagesConfig, root: Path) -> PurePosixPath:
    folder = PurePosixPath(config.output.as_posix())
    if _leaves(folder) or not (root / folder).resolve().is_relative_to(root):
        raise ConfigError(
            f"--output {config.output} leaves the data root.",
            "Name a folder inside it: images.txt holds paths relative to it.",
        )
    return folder


def _check_list(path: Path, text: str, *, overwrite: bool) -> None:
    if overwrite or not path.exists() or path.read_bytes() == text.encode():
        return
    raise DatasetError(
        f"{path} is there already and names other pictures.", hint="Add --overwrite to replace it."
    )


def _extract(
    config: ExtractImagesConfig, root: Path, names: list[str], listed: Sequence[str], paths: Sequence[Path]
) -> ExtractResult:
    jobs, sources = dict(zip(names, paths, strict=True)), dict(zip(names, listed, strict=True))
    written, failures = 0, dict[str, str]()
    take = partial(_take, config, root)
    with (
        ThreadPoolExecutor(reading_threads(config.workers)) as pool,
        Progress("images", len(jobs), "images") as progress,
    ):
        for name, outcome in zip(jobs, pool.map(take, jobs.keys(), jobs.values()), strict=True):
            if isinstance(outcome, VideoError):
                failures[sources[name]] = outcome.message
            written += outcome is True
            progress.advance(failed=len(failures))
    return ExtractResult(names, written, len(jobs) - written - len(failures), failures)


def _take(config: ExtractImagesConfig, root: Path, name: str, video: Path) -> bool | VideoError:
    """Write one picture; ``False`` where it is there already, the error where the video cannot be read."""
    target, content = root / name, content_id(video)
    if target.exists() and not config.overwrite and _source_of(target) in (content, None):
        return False
    try:
        picture = _first_picture(video, config)
    except VideoError as error:
        return error
    if not target.parent.resolve().is_relative_to(root):
        return VideoError(f"{name} links out of the data root")
    make_folder(target.parent)
    write_atomic(target, _png(picture, content))
    return True


def _first_picture(video: Path, config: ExtractImagesConfig) -> torch.Tensor:
    """The frame shown first, as a player shows it: upright, square pixels, uint8 RGB [H, W, 3]."""
    with open_video(video, config.reader) as opened:
        display = opened.info.display
    return load_first_frame(video, ClipRequest(1, display, fit="stretch", reader=config.reader))


def _png(picture_hwc: torch.Tensor, content: str) -> bytes:
    from PIL import Image, PngImagePlugin

    facts = PngImagePlugin.PngInfo()
    facts.add_text(_MARK, content)
    stream = io.BytesIO()
    Image.fromarray(picture_hwc.numpy()).save(stream, "PNG", pnginfo=facts)
    return stream.getvalue()


def _source_of(picture: Path) -> str | None:
    """The video that a picture of ours was taken from; ``None`` for a picture that is not ours."""
    from PIL import Image

    try:
        with Image.open(picture, formats=("PNG",)) as image:
            mark = image.info.get(_MARK)
            return mark if isinstance(mark, str) else None
    except Exception:  # Pillow raises many kinds over damaged files; none of them is a picture of ours
        return None


def _tell(config: ExtractImagesConfig, result: ExtractResult) -> None:
    say(
        f"{config.data_root / config.output}: {result.written} images written, {result.kept} already there, "
        f"{len(result.failures)} failed."
    )
    if not result.failures:
        return
    for source, reason in result.failures.items():
        say(f"  {source}: {reason}")
    raise PartialFailureError(
        f"{len(result.failures)} videos could not be read; {_LIST} is not written before every video has an image.",
        "Mend these videos, or take their lines out of all lists, and run the same command again.",
    )
