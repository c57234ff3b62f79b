"""Writing measured figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cogcache.cache.files import make_folder, storage_errors

__all__ = ["write_figures"]


def write_figures(path: Path | None, facts: Mapping[str, object], result: Mapping[str, object]) -> None:
    """Write ``result`` with the machine's facts as JSON; nothing where no path is given.

    Raises:
        StorageError: if it cannot be written.
    """
    if path is None:
        return
    make_folder(path.absolute().parent)
    with storage_errors(path):
        path.write_text(json.dumps({"facts": facts, **result}, indent=2) + "\n", "utf-8")
