"""The keys of entries: what is hashed beside the fingerprint, for each series.

A key is a function of what was encoded, never of where it came from, so equal clips share an entry and a changed
one gets another.
"""

from __future__ import annotations

from typing import Any

from cogcache.cache.format import Fingerprint, entry_key

__all__ = ["image_key", "latent_key", "text_key"]


def latent_key(fingerprint: Fingerprint, sha256: str, window: str, bucket: object) -> str:
    """Of a clip: hash of the video, readable name of the part of it, and its bucket (``49x480x720``)."""
    return entry_key(fingerprint, source=sha256, window=window, bucket=str(bucket))


def text_key(fingerprint: Fingerprint, caption: str) -> str:
    """Of a caption's embedding."""
    return entry_key(fingerprint, caption=caption)


def image_key(fingerprint: Fingerprint, image: str, size: object, draw: Any) -> str:
    """Of an image condition: identity of the picture, its size (``480x720``), number of the draw (None: no noise)."""
    return entry_key(fingerprint, image=image, size=str(size), draw="clean" if draw is None else draw)
