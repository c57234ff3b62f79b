"""Removing a whole series of a cache, so that it can be made anew with other settings."""

from __future__ import annotations

from pathlib import Path

from cogcache.cache.files import remove, remove_tree
from cogcache.cache.folder import SeriesFolder
from cogcache.cache.format import IDENTITY_FILE, MANIFEST_FILE, Identity
from cogcache.cache.identity import check_same, read_identity, write_identity
from cogcache.cache.lock import cache_lock
from cogcache.errors import CacheError

__all__ = ["drop_series"]


def drop_series(root: Path, series: str, wanted: Identity) -> None:
    """Remove a series with all its shards, so that it can be made anew with any settings; the others stay.

    The manifest goes first: until the next commit the cache counts as unfinished. Nothing happens where the series
    or the cache is not there.

    Args:
        wanted: Identity of the run that will make it anew.

    Raises:
        MismatchError: if anything but ``series`` differs from ``wanted``; then nothing is removed.
        CacheError: if another process is filling the series.
        StorageError: if something cannot be removed.
    """
    if not (root / IDENTITY_FILE).exists():
        return
    with cache_lock(root):
        identity = read_identity(root)
        if series not in identity.series:
            return
        wanted = Identity.model_validate(wanted.model_dump(mode="json"))
        check_same(root, identity, wanted, wanted.series.keys() - {series})
        folder = SeriesFolder(root, identity, series)
        if any(folder.is_claimed(name) for name in folder.unfinished()):
            raise CacheError(f"another process is filling {series} in {root}.", "Wait for it to end.")
        remove(root / MANIFEST_FILE)
        remove_tree(root / series)
        rest = {name: value for name, value in identity.series.items() if name != series}
        write_identity(root, identity.model_copy(update={"series": rest}))
