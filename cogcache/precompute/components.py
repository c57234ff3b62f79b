"""What of a checkpoint's component goes into a fingerprint beside its weights."""

from __future__ import annotations

from pathlib import Path

from cogcache.cache.format import digest
from cogcache.variants import read_config

__all__ = ["config_digest"]


def config_digest(root: Path, component: str) -> str:
    """Hex sha256 of a component's ``config.json``, without what diffusers and transformers note of themselves.

    Raises:
        ModelError: if it is missing or not a JSON object.
    """
    config = read_config(root, f"{component}/config.json")
    told = ("_", "transformers_version")
    return digest({name: value for name, value in config.items() if not name.startswith(told)})
