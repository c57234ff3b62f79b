"""Memory measures of training: the same gradients in less memory or less time.

:mod:`~cogcache.train.memory.measures` names them and the tiers, :mod:`~cogcache.train.memory.forecast` expects what
they take, :mod:`~cogcache.train.memory.choose` decides, :mod:`~cogcache.train.memory.blocks` runs the blocks.
"""

from __future__ import annotations

__all__: list[str] = []
