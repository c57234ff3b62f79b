"""Measurements that users can repeat on their own machine: ``cogcache bench``."""

from __future__ import annotations

__all__: list[str] = []
