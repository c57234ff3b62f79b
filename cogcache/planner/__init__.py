"""``cogcache plan``: what a model, clips and a GPU come to in memory, time and disk, before anything is loaded."""

from __future__ import annotations

__all__: list[str] = []
