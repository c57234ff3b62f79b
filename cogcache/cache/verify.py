"""The command ``cogcache verify``: check, tell, and where asked for, repair."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from cogcache.cache.backend import BACKENDS, backend_of, data_files
from cogcache.cache.check import Checked, check_cache
from cogcache.cache.damage import Damage, Repaired, Report
from cogcache.cache.reader import CacheReader
from cogcache.cache.repair import repair_cache
from cogcache.errors import ConfigError, DamageFoundError, PartialFailureError
from cogcache.location import Location, Url
from cogcache.progress import Progress

__all__ = ["verify"]

_SETTINGS = "encode.config.yaml"


def verify(
    root: Location,
    *,
    repair: bool = False,
    as_json: bool = False,
    decode: Callable[[Report], None] | None = None,
) -> None:
    """Check a cache and print the report to standard output.

    Args:
        root: Folder or URL of the cache. One at a URL is read through, against the manifest's hashes only.
        repair: Make it valid again.
        as_json: Print one JSON object: the report, and after a repair ``repaired`` and ``after``.
        decode: A further check of a cache that is whole so far; adds to the report.

    Raises:
        DamageFoundError: if the cache is not whole, or repair could not make it so.
        PartialFailureError: if the repair lost something that encode must make again.
        CacheError, StorageError: as :func:`check_cache` and :func:`repair_cache` say.
    """
    if isinstance(root, Url):
        if repair:
            raise ConfigError(
                f"{root} cannot be repaired there.", "Copy the cache to a folder, repair it, copy it back."
            )
        report = check_remote(root)
        _tell(report, as_json)
        return _verdict(report)
    checked = _checked(root)
    if decode is not None and checked.report.whole:
        decode(checked.report)
    if not repair or checked.report.whole:
        _tell(checked.report, as_json)
        return _verdict(checked.report)
    result = repair_cache(checked, _model_id(root))
    after = check_cache(root).report
    _tell(checked.report, as_json, result, after)
    if result.missing:
        raise PartialFailureError(
            f"{root} was repaired, but not all of it could be kept.",
            "Run encode again: it makes just what is missing.",
        )
    return _verdict(after)


def _checked(root: Path) -> Checked:
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    files = (path for name in BACKENDS for f in folders for _, _, path in data_files(backend_of(name), f))
    total = sum(path.stat().st_size for path in files if path.is_file())
    read = 0
    with Progress("Checking", -(-total // 1_000_000), "MB") as progress:

        def advance(amount: int) -> None:
            nonlocal read
            read += amount
            progress.advance(-(-read // 1_000_000) - progress.done)

        return check_cache(root, advance)


def check_remote(root: Url) -> Report:
    """Read every shard of a cache on a server, and compare manifest, tables, indexes and shards with their hashes.

    Raises:
        CacheError: if there is no cache, or its manifest, tables or indexes are damaged.
    """
    reader = CacheReader(root)
    report = Report(str(root))
    shards = [shard for series in reader.manifest.series.values() for shard in series.shards]
    report.counts = {
        "bytes": sum(shard.bytes for shard in shards),
        "shards": len(shards),
        "entries": sum(shard.entries for shard in shards),
        "samples": len(reader.samples),
        "failures": len(reader.failures),
    }
    for error in reader.damages():
        file, _, what = error.message.removeprefix(f"{root}/").partition(" ")
        report.damages.append(Damage(file, what.removeprefix("is damaged: ").rstrip(".")))
    return report


def _tell(report: Report, as_json: bool, result: Repaired | None = None, after: Report | None = None) -> None:
    if as_json:
        value = report.to_json()
        if result and after:
            value |= {"repaired": result.done, "encode_needed": result.missing, "after": after.to_json()}
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    lines = report.lines() + [f"repaired {line}" for line in (result.done if result else [])]
    sys.stdout.write("\n".join(line.encode("utf-8", "backslashreplace").decode() for line in lines) + "\n")


def _verdict(report: Report) -> None:
    if report.whole:
        return
    count = len(report.damages)
    raise DamageFoundError(
        f"{report.root} is not whole: {count} {'damage' if count == 1 else 'damages'}, listed above.",
        "Run 'cogcache verify --repair' on it, then encode: only what is damaged is made again.",
    )


def _model_id(root: Path) -> str | None:
    """The base model as encode was last given it, for a ``cache.json`` that is rebuilt."""
    from cogcache.config_io import read_yaml

    try:
        model = read_yaml(root / _SETTINGS).get("model")
    except ConfigError:
        return None
    if not isinstance(model, str):
        return None
    local = Path(model).expanduser()
    return str(local.resolve()) if local.is_dir() else model
