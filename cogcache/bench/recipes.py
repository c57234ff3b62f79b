"""The rows of ``cogcache bench train``: ways to train the same LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from cogcache.bench.group_offload import Level
from cogcache.train.memory.measures import TIERS, TINY, Measures

__all__ = ["DEFAULT_RECIPES", "RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """One way.

    Attributes:
        autocast: Hold the base in float32 and run it under bfloat16 autocast, as the published trainers do. Else it
            is held in the dtype of the published weights.
        compiled: Compile diffusers' own blocks, where ``measures`` leaves them.
        measures: Of the blocks; None leaves them diffusers' own, fully checkpointed.
        offload: The level of diffusers' group offloading, where that is used.
    """

    autocast: bool = False
    compiled: bool = False
    measures: Measures | None = None
    offload: Level | None = None


RECIPES: dict[str, Recipe] = {
    "reference": Recipe(autocast=True),
    "plain": Recipe(),
    "plain-compiled": Recipe(compiled=True),
    **{tier: Recipe(measures=measures) for tier, measures in TIERS.items()},
    "tiny-attention-again": Recipe(measures=TINY[1]),
    "tiny-int8": Recipe(measures=TINY[2]),
    "group-offload": Recipe(autocast=True, offload="leaf_level"),
    "group-offload-block": Recipe(autocast=True, offload="block_level"),
    "plain-group-offload": Recipe(offload="leaf_level"),
}
DEFAULT_RECIPES = ("reference", "plain", *TIERS)
