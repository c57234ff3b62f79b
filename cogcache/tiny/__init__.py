"""A complete CogVideoX of a few MB with random weights, for the demo, the tests and for trying things out.

Every file and config key of a real checkpoint in diffusers layout is there, with the family's real facts (see
:mod:`cogcache.tiny.families`); only depth, width and default picture are small. Its videos mean nothing.
"""

from cogcache.tiny.build import build_tiny_model
from cogcache.tiny.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "build_tiny_model"]
