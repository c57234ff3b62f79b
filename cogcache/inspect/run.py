"""``cogcache inspect``: what to read, and where the result goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cogcache.cache.files import make_folder, storage_errors
from cogcache.cache.reader import CacheReader
from cogcache.config_io import read_yaml
from cogcache.errors import ConfigError
from cogcache.inspect.gather import gather
from cogcache.inspect.table import as_text, size_text
from cogcache.location import Location
from cogcache.progress import say

__all__ = ["inspect_shards"]


def inspect_shards(
    shards: Location | str,
    *,
    as_json: bool = False,
    html: Path | None = None,
    latents: bool | None = None,
    data_root: Path | None = None,
) -> dict[str, Any]:
    """Look at a cache and tell what is in it: a table or JSON on standard output, a gallery in a file.

    Args:
        as_json: Print JSON instead of the table.
        html: File for the gallery.
        latents: Read every latent for statistics and outliers; by default only for the gallery.
        data_root: Folder of the videos, for pictures; by default the one that was encoded from.

    Raises:
        CacheError, DamagedCacheError: if the cache cannot be used.
        StorageError: if the gallery cannot be written.
    """
    reader = CacheReader(shards)
    look = None
    if latents or (latents is None and html is not None):
        from cogcache.inspect.latents import look_at

        root = (data_root or _recorded_root(reader.root)) if html else None
        look = look_at(reader, html is not None, root)
    report = gather(reader, look)
    if html is not None:
        from cogcache.inspect.gallery import gallery

        page = gallery(report).encode()
        make_folder(html.absolute().parent)
        with storage_errors(html):
            html.write_bytes(page)
        say(f"Wrote {html} ({size_text(len(page))})")
    for clip in report["samples"]:
        clip.pop("picture", None)
    if as_json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    elif html is None:
        sys.stdout.write(as_text(report) + "\n")
    return report


def _recorded_root(root: Location) -> Path | None:
    """The data root that the last encode was given, as it was given; not known of a cache at a URL."""
    if not isinstance(root, Path):
        return None
    try:
        value = read_yaml(root / "encode.config.yaml").get("data_root")
    except ConfigError:
        return None
    return Path(value) if isinstance(value, str) else None
