"""Random draws as a pure function of (seed, epoch, sample, purpose).

No draw depends on the order of work, the number of processes or workers, or on anything drawn
before it. That is what makes a resumed run equal to one never interrupted.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["generator", "seed_for", "uniform"]


def seed_for(*parts: object) -> int:
    """Hash ``parts`` (their ``str``) to a seed in [0, 2**63)."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by ``parts``, for example ``(seed, epoch, sample_id, "noise")``."""
    import torch

    return torch.Generator("cpu").manual_seed(seed_for(*parts))


def uniform(*parts: object) -> float:
    """One number in [0, 1), decided by ``parts`` alone."""
    return seed_for(*parts) / 2**63
