"""A new folder that appears complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogcache.errors import StorageError

__all__ = ["whole_folder"]


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Within this, fill the folder that is given, which is not there yet; it becomes ``out`` when all went well.

    Args:
        out: New or empty folder. Its parents are made.

    Raises:
        StorageError: if ``out`` is there and not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(
            f"{out} is there already and is not an empty folder.", "Choose another name or delete it."
        )
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield staging / "whole"
        (staging / "whole").replace(out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}.") from None
    finally:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)
