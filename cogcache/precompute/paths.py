"""From a listed name to a real file inside the data root."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cogcache.errors import DatasetError

__all__ = ["ClipItem", "Locator"]


@dataclass(frozen=True)
class ClipItem:
    """One clip and its caption.

    Attributes:
        path: Absolute path of the video, links resolved.
        source: The video as listed, relative to the data root, with ``/``.
        caption: Its caption, without surrounding white space.
        image: First frame for image-to-video, relative to the data root, with ``/``; ``data_root / image``
            is the file.
    """

    path: Path
    source: str
    caption: str
    image: str | None = None


@dataclass(frozen=True)
class Locator:
    """Finds listed files below ``root`` (resolved), and nowhere else unless ``allow_outside``.

    ``called`` is what messages call the root.
    """

    root: Path
    allow_outside: bool
    called: str = "data root"

    def find(self, name: str) -> tuple[Path, str]:
        """The real file that ``name`` means, and its name below the root with ``/``, as the disk spells it.

        File systems differ in how they store accents: a name typed as NFC finds a file stored as NFD, and
        the other way round. The name as written goes first.

        Raises:
            DatasetError: if ``name`` leaves the root, or is not a file.
        """
        listed = PurePosixPath(name)
        if not self.allow_outside and (listed.is_absolute() or ".." in listed.parts):
            raise DatasetError(f"{name} leaves the {self.called}{_ALLOW}")
        spellings = dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])
        for spelling in spellings:
            path = self.real_file(self.root / spelling)
            if path is not None:
                return path, PurePosixPath(spelling).as_posix()
        what = "is a folder, not a file" if (self.root / name).is_dir() else "does not exist"
        raise DatasetError(f"{name} {what}")

    def real_file(self, path: Path) -> Path | None:
        """``path`` with links resolved, or ``None`` if it is not a file.

        Raises:
            DatasetError: if a link leads out of the root, or the file system refuses to look.
        """
        try:
            if not path.is_file():
                return None
            real = path.resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DatasetError(f"{path.name} cannot be looked up: {reason}") from None
        if not self.allow_outside and not real.is_relative_to(self.root):
            raise DatasetError(
                f"{path.relative_to(self.root).as_posix()} links out of the {self.called}{_ALLOW}"
            )
        return real


_ALLOW = " (--allow-outside accepts this)"
