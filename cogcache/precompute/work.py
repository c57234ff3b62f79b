"""All that a run of encode can make, and which shards it goes into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogcache.cache.format import IMAGES, LATENTS, TEXT
from cogcache.cache.names import parse_group
from cogcache.cache.writer import CacheWriter
from cogcache.geometry import Size
from cogcache.models import torch_dtype
from cogcache.precompute.clips import ClipWork, text_key
from cogcache.precompute.piece import Piece, Tally
from cogcache.precompute.pieces import image_pieces, latent_piece, validation_pieces
from cogcache.precompute.settings import EncodeSettings
from cogcache.precompute.validation import ValidationPrompts

__all__ = ["Work", "plan_work"]


@dataclass(frozen=True)
class Work:
    """All entries that a run can make, done or not, and what it has done of them."""

    pieces: Mapping[str, Sequence[Piece[Any, Any]]]
    captions: Mapping[str, str]
    tallies: dict[str, Tally]

    @classmethod
    def of(cls, clips: Sequence[ClipWork], prompts: ValidationPrompts, settings: EncodeSettings) -> Work:
        pieces: dict[str, Sequence[Piece[Any, Any]]] = {
            LATENTS: [latent_piece(clip, settings) for clip in clips]
        }
        images = [piece for clip in clips for piece in image_pieces(clip, settings)]
        images += validation_pieces(prompts.images, settings)
        if images:
            pieces[IMAGES] = images
        # The empty caption is always there: caption dropout and classifier-free guidance use it.
        captions = {text_key(settings, ""): ""} | {clip.text: clip.item.caption for clip in clips}
        captions |= prompts.captions
        return cls(pieces, captions, {series: Tally() for series in (*pieces, TEXT)})

    @property
    def wanted(self) -> dict[str, list[str]]:
        """Series -> keys."""
        keys = {series: [piece.key for piece in pieces] for series, pieces in self.pieces.items()}
        return {**keys, TEXT: list(self.captions)}


def plan_work(writer: CacheWriter, work: Work, settings: EncodeSettings) -> None:
    """Plan the shards of everything that is neither there nor planned already."""
    for series, pieces in work.pieces.items():
        _plan(writer, series, pieces, settings)
    values = settings.variant.text_length * settings.variant.text_dim
    group = str(settings.variant.text_length)
    writer.plan(TEXT, list(work.captions), _per_shard(settings, settings.text_dtype, values), group)


def _plan(
    writer: CacheWriter, series: str, pieces: Sequence[Piece[Any, Any]], settings: EncodeSettings
) -> None:
    """Plan the shards of each group by itself, in the order of their numbers."""
    groups: dict[str, list[str]] = {}
    for piece in pieces:
        groups.setdefault(piece.group, []).append(piece.key)
    for group in sorted(groups, key=parse_group):
        *frames, height, width = parse_group(group)
        values = _product(settings.variant.latent_shape(frames[0] if frames else 1, Size(height, width)))
        # Latents are kept as mean and log-variance, of 8 bits beside 16 where wanted; image conditions as one value.
        if series == LATENTS:
            values = values * 3 // 2 if settings.config.log_variance == "8bit" else values * 2
        writer.plan(series, groups[group], _per_shard(settings, settings.vae_dtype, values), group)


def _per_shard(settings: EncodeSettings, dtype: str, values: int) -> int:
    """Entries of ``values`` numbers each that fill a shard."""
    return max(1, int(settings.config.shard_size * 1e6 // (values * torch_dtype(dtype).itemsize)))


def _product(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
