"""diffusers' group offloading under a LoRA in training, for comparison with the memory tiers.

It is made for inference: a hook brings a module's weights to the device before its forward pass and, after it, points
the parameters at their copies on the host again. What that does to a backward pass (diffusers 0.42.1, non-reentrant
checkpointing):

- ``LayerNorm`` saves its weight *itself* for the backward pass, which then finds it on the host: an error on a GPU.
  Here it saves an alias, which keeps the device's copy. Linear layers save a view of theirs anyway.
- A LoRA that is offloaded, too, would get gradients on one device for parameters on the other. So it is added
  afterwards, and stays on the device.
- Weights are fetched ahead in the order of the forward pass, and the backward pass runs through the blocks the other
  way: computing block i again fetches what follows it, once more. With ``leaf_level`` that is one layer a block. With
  ``block_level`` it is block i + 1, which nobody lets go of: all blocks are on the device when the backward pass ends.
  Nor can a LoRA be added to blocks that are offloaded: their copies have been listed.

So ``leaf_level`` trains, with the plain recipe's gradients to the bit; ``block_level`` does not.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

__all__ = ["Level", "alias_norm_weights", "offload_groups"]

Level = Literal["leaf_level", "block_level"]


def offload_groups(transformer: Any, level: Level, device: torch.device) -> None:
    """Keep the weights of a frozen ``transformer``, which holds no LoRA yet, on the host until they are used."""
    alias_norm_weights(transformer)
    streams = device.type == "cuda"
    transformer.to("cpu").enable_group_offload(
        onload_device=device,
        offload_type=level,
        num_blocks_per_group=1 if level == "block_level" else None,
        use_stream=streams,
        record_stream=streams,
    )


def alias_norm_weights(model: nn.Module) -> None:
    """Let each ``LayerNorm`` save aliases of its weights for the backward pass, not the parameters themselves."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = _AliasingNorm


class _AliasingNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (None if one is None else one.view_as(one) for one in (self.weight, self.bias))
        return layer_norm(input, self.normalized_shape, weight, bias, self.eps)
