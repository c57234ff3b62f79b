"""A small CogVideoX whose weights are trained, and the made-up world that its captions speak of."""

from __future__ import annotations

from cogcache.small.architecture import KINDS, Kind
from cogcache.small.shapes import NOVEL, Scene, all_scenes, render
from cogcache.small.shipped import small_model

__all__ = ["KINDS", "NOVEL", "Kind", "Scene", "all_scenes", "render", "small_model"]
