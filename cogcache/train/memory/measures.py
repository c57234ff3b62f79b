"""What can be done about memory in training, and the tiers that combine it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TIERS", "Measures", "Place", "Tier"]

Tier = Literal["fast", "balanced", "small", "tiny"]
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Measures:
    """The single measures. None of them changes what is computed, only where it is kept and how often it is done.

    Attributes:
        recompute: Compute each block's activations again in the backward pass instead of keeping them. The rest but
            ``compile`` and ``optimizer`` needs it.
        attention: Where attention outputs are kept, so that attention itself is not computed again; None: it is.
        inputs: Where each block's input is kept.
        weights: Where the blocks' frozen weights are kept; on the host they are streamed, one block ahead.
        optimizer: Where the optimizer's state is kept.
        compile: Compile the blocks.
    """

    recompute: bool = True
    attention: Place | None = None
    inputs: Place = "device"
    weights: Place = "device"
    optimizer: Place = "device"
    compile: bool = False


TIERS: dict[Tier, Measures] = {
    "fast": Measures(recompute=False, compile=True),
    "balanced": Measures(attention="device", inputs="host", compile=True),
    "small": Measures(attention="host", inputs="host", weights="host", compile=True),
    "tiny": Measures(attention="host", inputs="host", weights="host", optimizer="host", compile=True),
}
