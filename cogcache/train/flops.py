"""Floating-point operations of a training step, counted from the layers of a transformer.

A multiplication and an addition count as two. Matrix products (linear layers and the patch convolution) and attention
are counted, apart from each other; norms, activations and sums are not: they are bound by memory, not by arithmetic.
The rules are those of ``torch.utils.flop_counter``, which the tests hold this against:

- a product with a weight: 2 x weights x rows, once in the forward pass; in the backward pass once more if its input
  needs a gradient, and once more if its weight is trained;
- attention over S tokens: two products, 4 x heads x head dim x S^2; in the backward pass five, of which one is the
  scores anew, as all fused kernels do it.

The transformer may lie on the meta device: only names, shapes and ``requires_grad`` are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cogcache.geometry import Bucket
from cogcache.train.memory.measures import Measures
from cogcache.variants import Variant

__all__ = ["Flops", "StepFlops", "mean_flops", "step_flops"]


@dataclass(frozen=True)
class Flops:
    """Operations of matrix products with weights, and of attention."""

    linear: int = 0
    attention: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention)

    @property
    def total(self) -> int:
        """Both."""
        return self.linear + self.attention


@dataclass(frozen=True)
class StepFlops:
    """Operations of one microbatch: its forward pass, its backward pass, and what is done again to save memory."""

    forward: Flops = Flops()
    backward: Flops = Flops()
    recomputed: Flops = Flops()

    @property
    def needed(self) -> int:
        """Without what is done again: what a step is worth, whatever the memory tier."""
        return self.forward.total + self.backward.total

    @property
    def total(self) -> int:
        """Everything that the device computes."""
        return self.needed + self.recomputed.total


def mean_flops(steps: Sequence[tuple[StepFlops, int]]) -> StepFlops:
    """The mean of several steps, each with how often it is taken."""

    def mean(parts: Sequence[tuple[Flops, int]]) -> Flops:
        total = sum(count for _, count in parts)
        linear = sum(flops.linear * count for flops, count in parts)
        return Flops(
            round(linear / total), round(sum(flops.attention * count for flops, count in parts) / total)
        )

    return StepFlops(
        mean([(step.forward, count) for step, count in steps]),
        mean([(step.backward, count) for step, count in steps]),
        mean([(step.recomputed, count) for step, count in steps]),
    )


def step_flops(
    transformer: Any,
    variant: Variant,
    bucket: Bucket,
    batch_size: int = 1,
    measures: Measures | None = None,
) -> StepFlops:
    """Operations of one microbatch of ``batch_size`` samples of one bucket.

    Args:
        transformer: A ``CogVideoXTransformer3DModel`` that holds what is trained; also on the meta device.
        measures: What its blocks run under; None for diffusers' own blocks, with or without its checkpointing.
    """
    count = _Count(batch_size, variant.text_length, variant.video_tokens(bucket.frames, bucket.size))
    count.time_layers(transformer.time_embedding, batch_size)
    count.time_layers(transformer.ofs_embedding, 1)
    count.patches(transformer.patch_embed)
    again = Flops()
    for block in transformer.transformer_blocks:
        again += count.block(block, variant, measures)
    count.conditioned(transformer.norm_out.linear)
    count.last(transformer.proj_out)
    recomputes = transformer.gradient_checkpointing if measures is None else measures.recompute
    return StepFlops(count.forward, count.backward, again if recomputes else Flops())


class _Count:
    """Adds up layers in the order in which they run, and knows what needs a gradient there.

    ``hidden_grad`` and ``temb_grad``: whether the tokens and the embedding of the timestep do.
    """

    def __init__(self, batch: int, text: int, video: int) -> None:
        self.batch, self.text, self.video, self.tokens = batch, batch * text, batch * video, text + video
        self.forward, self.backward = Flops(), Flops()
        self.hidden_grad = self.temb_grad = False

    def time_layers(self, embedding: Any, rows: int) -> None:
        """Layers of the embedding of the timestep or of ofs; None has none."""
        grad = False
        for layer in (embedding.linear_1, embedding.linear_2) if embedding is not None else ():
            grad = self._layer(layer, rows, grad)
        self.temb_grad |= grad

    def patches(self, embedding: Any) -> None:
        """What makes tokens of text embeddings and latents, which need no gradient."""
        self.hidden_grad |= self._layer(embedding.text_proj, self.text, False)
        self.hidden_grad |= self._layer(embedding.proj, self.video, False)

    def conditioned(self, layer: nn.Module) -> None:
        """A layer that turns the timestep's embedding into shifts, scales and gates of the tokens."""
        self.hidden_grad |= self._layer(layer, self.batch, self.temb_grad)

    def last(self, layer: nn.Module) -> None:
        """What makes latents of tokens."""
        self._layer(layer, self.video, self.hidden_grad)

    def block(self, block: Any, variant: Variant, measures: Measures | None) -> Flops:
        """Count one block. Returns what it computes again if it recomputes."""
        before = self.forward
        attention, widen, narrow = block.attn1, block.ff.net[0], block.ff.net[2]
        rows = self.batch * self.tokens
        self.conditioned(block.norm1.linear)
        before_heads = self.forward
        heads = [
            self._layer(layer, rows, self.hidden_grad)
            for layer in (attention.to_q, attention.to_k, attention.to_v)
        ]
        of_heads = _difference(self.forward, before_heads)
        self._attention(variant, any(heads))
        self.hidden_grad |= self._layer(attention.to_out[0], rows, any(heads))
        self.conditioned(block.norm2.linear)
        inner = self._layer(widen.proj, rows, self.hidden_grad)
        until_last = self.forward
        self.hidden_grad |= self._layer(narrow, rows, inner)
        if measures is None:
            return _difference(self.forward, before)
        whole = _difference(self.forward if self._needs_last(block) else until_last, before)
        if measures.in_parts:
            whole += of_heads  # made twice
        return Flops(whole.linear) if measures.attention else whole

    def _needs_last(self, block: Any) -> bool:
        """Whether the last projection is computed again, too: as ``memory.pieces.can_skip_last`` has it."""
        parts = (block.ff.net[2], block.norm2.linear)
        return self.temb_grad or any(p.requires_grad for part in parts for p in part.parameters())

    def _attention(self, variant: Variant, needs: bool) -> None:
        width = variant.num_attention_heads * variant.attention_head_dim
        product = 2 * self.batch * width * self.tokens**2
        self.forward += Flops(attention=2 * product)
        self.backward += Flops(attention=5 * product * needs)

    def _layer(self, layer: Any, rows: int, needs: bool) -> bool:
        """Count a layer with its LoRA, over ``rows`` inputs, which need a gradient or not.

        Returns:
            Whether its output needs a gradient.
        """
        grad = self._weight(getattr(layer, "base_layer", layer).weight, rows, needs)
        for down, up in _low_rank(layer):
            grad |= self._weight(up, rows, self._weight(down, rows, needs))
        return grad

    def _weight(self, weight: Tensor, rows: int, needs: bool) -> bool:
        product = 2 * weight.numel() * rows
        self.forward += Flops(product)
        self.backward += Flops(product * (needs + weight.requires_grad))
        return needs or weight.requires_grad


def _difference(late: Flops, early: Flops) -> Flops:
    return Flops(late.linear - early.linear, late.attention - early.attention)


def _low_rank(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of each LoRA of a layer."""
    for name in getattr(layer, "active_adapters", []):
        if name in layer.lora_A:
            yield layer.lora_A[name].weight, layer.lora_B[name].weight
