"""What can be done about memory in training, and the tiers that combine it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["TIERS", "TINY", "Measures", "Place", "Storage", "Tier"]

Tier = Literal["fast", "balanced", "small", "tiny"]
Place = Literal["device", "host"]
Storage = Literal["native", "int8"]


@dataclass(frozen=True)
class Measures:
    """The single measures. None but ``storage`` changes what is computed, only where it is kept and how often it is
    done.

    Attributes:
        recompute: Compute each block's activations again in the backward pass instead of keeping them. The rest but
            ``compile`` and ``optimizer`` needs it.
        attention: Where attention outputs are kept, so that attention itself is not computed again; None: it is.
        inputs: Where each block's input is kept.
        weights: Where the blocks' frozen weights are kept; on the host they are streamed, one block ahead.
        storage: How the blocks' frozen matrices are kept: as they are, or in 8 bits, from which a block's are made anew
            each time it is at work.
        in_parts: Do a block's work in parts, see :mod:`~cogcache.train.memory.parts`.
        optimizer: Where the optimizer's state is kept.
        compile: Compile the blocks.
    """

    recompute: bool = True
    attention: Place | None = None
    inputs: Place = "device"
    weights: Place = "device"
    storage: Storage = "native"
    in_parts: bool = False
    optimizer: Place = "device"
    compile: bool = False

    @property
    def streams(self) -> bool:
        """Whether a block's weights are on the device, as it computes with them, only while it is at work."""
        return self.weights == "host" or self.storage != "native"


TIERS: dict[Tier, Measures] = {
    "fast": Measures(recompute=False, compile=True),
    "balanced": Measures(attention="device", inputs="host", compile=True),
    "small": Measures(attention="host", inputs="host", weights="host", compile=True),
    "tiny": Measures(
        attention="host", inputs="host", weights="host", in_parts=True, optimizer="host", compile=True
    ),
}
TINY: tuple[Measures, ...] = (
    TIERS["tiny"],
    replace(TIERS["tiny"], attention=None),
    replace(TIERS["tiny"], attention=None, optimizer="device", storage="int8"),
)
"""What ``tiny`` does on hosts of ever less memory: attention computed again, then also the base in 8 bits."""
