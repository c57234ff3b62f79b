"""A small CogVideoX whose weights are trained, and the made-up world that its captions speak of."""

from __future__ import annotations

from cogcache.small.shapes import NOVEL, Scene, all_scenes, render

__all__ = ["NOVEL", "Scene", "all_scenes", "render"]
