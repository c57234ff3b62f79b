"""Gradients of a block, gathered from its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["GradientSum", "leaves"]


def leaves(sources: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """The same values as beginnings of a new graph, where a gradient is needed."""
    return [tensor.detach().requires_grad_(need) for tensor, need in zip(sources, needs, strict=False)]


class GradientSum:
    """The gradient of each of a block's sources, added up over its parts.

    Args:
        needs: Whether a source needs one. The others stay None.
    """

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needs = needs
        self.grads: list[Tensor | None] = [None] * len(needs)

    def add(
        self,
        sources: Sequence[Tensor],
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        extra: Tensor | None = None,
    ) -> Tensor | None:
        """Go back from ``grads`` of ``outputs``, and add what arrives at ``sources``.

        Returns:
            What arrives at ``extra``.
        """
        places = [place for place, need in enumerate(self.needs) if need]
        wanted = [sources[place] for place in places] + ([] if extra is None else [extra])
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        if not pairs or not wanted:
            return None
        found = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
        )
        for place, grad in zip(places, found, strict=False):
            if grad is not None:
                mine = self.grads[place]
                self.grads[place] = grad if mine is None else mine + grad
        return None if extra is None else found[-1]
