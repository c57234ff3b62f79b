"""Memory measures of training: the same gradients in less memory or less time.

:mod:`~cogcache.train.memory.measures` names them and the tiers, :mod:`~cogcache.train.memory.choose` decides,
:mod:`~cogcache.train.memory.blocks` runs the blocks under them.
"""

from __future__ import annotations

from cogcache.train.memory.place import place_blocks

__all__ = ["place_blocks"]
