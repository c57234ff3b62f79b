"""What the VAE is shown while it is trained: pieces of clips, and a camera that goes over single pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int, int]
"""Frames, height and width."""

SCALES = (0.8, 1.25)
"""Pixels of a picture that become one: how near the camera comes and how far it goes."""

RECOLOURED = 0.25
"""Share of what is shown whose red, green and blue change places."""

_ORDERS = torch.tensor(list(itertools.permutations(range(3))))


class Source(Protocol):
    """Something to draw from."""

    def __len__(self) -> int: ...

    def draw(self, count: int, size: Size) -> Tensor:
        """uint8 [count, F, H, W, 3] on the source's device, another at each call."""
        ...


class Clips:
    """Random pieces of clips: mirrored or not, forwards or backwards.

    Args:
        clips_bfhwc: uint8 [N, F, H, W, 3].
    """

    def __init__(self, clips_bfhwc: Tensor) -> None:
        self.clips = clips_bfhwc

    def __len__(self) -> int:
        return len(self.clips)

    def draw(self, count: int, size: Size) -> Tensor:
        return torch.stack([self._piece(size) for _ in range(count)])

    def _piece(self, size: Size) -> Tensor:
        limits = [
            len(self.clips),
            *(have - take + 1 for have, take in zip(self.clips.shape[1:4], size, strict=True)),
        ]
        chosen, first, down, right, mirrored, backwards = (
            int(torch.randint(limit, ())) for limit in (*limits, 2, 2)
        )
        frames, height, width = size
        piece = self.clips[chosen, first : first + frames, down : down + height, right : right + width]
        axes = [axis for axis, turned in ((2, mirrored), (0, backwards)) if turned]
        return piece.flip(axes)


class Pictures:
    """A camera that goes evenly from one place and scale in a picture to another; the picture is mirrored or not.

    Args:
        pictures_bhwc: uint8 [N, H, W, 3], each at least 1.25 times as large as what is drawn.
    """

    def __init__(self, pictures_bhwc: Tensor) -> None:
        self.pictures = pictures_bhwc.permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.pictures)

    def draw(self, count: int, size: Size) -> Tensor:
        frames, height, width = size
        device = self.pictures.device
        chosen = self.pictures[torch.randint(len(self), (count,), device=device)].float()
        moment = torch.linspace(0, 1, frames, device=device).view(1, -1, 1) if frames > 1 else 0.0
        way = torch.lerp(
            *(self._stations(count, size)[:, None] for _ in "ab"),
            weight=moment + torch.zeros((), device=device),
        )
        grid = self._grid(way, height, width)
        seen = functional.grid_sample(
            chosen, grid.flatten(1, 2), "bilinear", "border", align_corners=False
        ).view(count, 3, -1, height, width)
        return seen.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)

    def _stations(self, count: int, size: Size) -> Tensor:
        """Where a camera begins or ends: centre down and right in pixels, and scale; [count, 3]."""
        device, (high, wide) = self.pictures.device, self.pictures.shape[2:]
        scale = torch.empty(count, device=device).uniform_(*SCALES)
        centres = [
            half + (whole - 2 * half) * torch.rand(count, device=device)
            for whole, half in ((high, scale * size[1] / 2), (wide, scale * size[2] / 2))
        ]
        return torch.stack([*centres, scale], dim=1)

    def _grid(self, way: Tensor, height: int, width: int) -> Tensor:
        """Places to sample, as ``grid_sample`` wants them: [count, F, height, width, 2], right before down, -1 to 1."""
        axes = []
        for axis, (have, take) in enumerate(zip(self.pictures.shape[2:], (height, width), strict=True)):
            offsets = torch.arange(take, device=way.device) - (take - 1) / 2
            pixels = way[:, :, axis, None] + way[:, :, 2, None] * offsets
            axes.append(2 * pixels / have - 1)
        mirrored = torch.randint(2, (len(way), 1, 1), device=way.device) * 2 - 1
        down, right = axes[0], axes[1] * mirrored
        size = (*way.shape[:2], height, width)
        return torch.stack([right[:, :, None, :].expand(size), down[:, :, :, None].expand(size)], dim=-1)


def draw(kinds: Sequence[Source], count: int, size: Size) -> Tensor:
    """``count`` pieces, uint8 [B, F, H, W, 3], from the kinds in turn; one that is named twice comes twice as often."""
    names = [kinds[number % len(kinds)] for number in range(count)]
    pieces = torch.cat(
        [kind.draw(sum(name is kind for name in names), size) for kind in dict.fromkeys(names)]
    )
    orders = _ORDERS.to(pieces.device)
    chosen = torch.randint(len(orders), (count,), device=pieces.device)
    chosen = torch.where(torch.rand(count, device=pieces.device) < RECOLOURED, chosen, 0)
    return pieces.gather(-1, orders[chosen].view(count, 1, 1, 1, 3).expand_as(pieces))
