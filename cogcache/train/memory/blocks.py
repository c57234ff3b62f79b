"""Runs the transformer's blocks under memory measures: what is kept, where, and what is computed again.

With recomputation each block is one step of the autograd graph. Its forward pass records nothing but keeps its input,
and where asked its attention output; its backward pass computes the parts before and after attention again, and runs
attention's backward kernel on what was kept. Blocks run in order and back, so weights and kept tensors are fetched one
block ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cogcache.int8 import put_in_int8
from cogcache.streamed import CopyStreams, StreamedWeights, move_without
from cogcache.train.memory.attention import Attended, attend, attend_backward, attention
from cogcache.train.memory.gradients import GradientSum, leaves
from cogcache.train.memory.host import HostPool, Kept
from cogcache.train.memory.measures import Measures
from cogcache.train.memory.parts import (
    after_in_parts,
    backward_after_in_parts,
    backward_before_in_parts,
)
from cogcache.train.memory.pieces import Pieces, Rotary, can_skip_last, pieces, rotation

__all__ = ["BlockRunner", "home_of", "install"]

Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass
class _Record:
    """What one forward pass of one block left for its backward pass.

    ``before`` is the record of the block that ran before: it is next in the backward pass.
    """

    index: int
    hidden: Tensor | Kept
    text: Tensor
    temb: Tensor
    rotary: Rotary
    before: _Record | None
    out: Tensor | Kept | None = None
    attended: Attended | None = None


class BlockRunner:
    """The blocks of one transformer, with everything that is kept outside of the autograd graph."""

    def __init__(
        self, blocks: Sequence[nn.Module], measures: Measures, device: torch.device, kept_bytes: int = 0
    ) -> None:
        self.blocks, self.measures = blocks, measures
        streams = CopyStreams(device)
        self._pool = HostPool(streams, kept_bytes)
        frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        on_device = measures.weights == "device"
        self._weights = StreamedWeights(frozen, streams, on_device=on_device) if measures.streams else None
        self._eager, self._trained = pieces(compiled=False), pieces(compiled=measures.compile)
        self._last: _Record | None = None
        self._tables: tuple[Rotary, Rotary] = (None, None)

    def forward(self, index: int, hidden: Tensor, text: Tensor, temb: Tensor, rotary: Rotary) -> Pair:
        """What the block's own ``forward`` returns. Outside of training nothing is compiled: shapes vary there."""
        block = self.blocks[index]
        rotary = self._rotation(rotary, text.shape[1])
        if not torch.is_grad_enabled():
            return self._run(self._eager, index, hidden, text, temb, rotary)
        if not self.measures.recompute:
            heads = self._trained.before(block, hidden, text, temb, rotary)
            kept: Pair = self._trained.after(block, hidden, text, temb, attention(*heads))
            return kept
        step: Any = _BlockStep
        pair: Pair = step.apply(self, index, rotary, hidden, text, temb, *_trained(block))
        return pair

    def _rotation(self, rotary: Rotary, length: int) -> Rotary:
        """Made for the first block and used by all."""
        if rotary is not self._tables[0]:
            self._tables = rotary, rotation(rotary, length)
        return self._tables[1]

    def _run(
        self,
        how: Pieces,
        index: int,
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        rotary: Rotary,
        keep: Callable[[Attended], None] = lambda _: None,
    ) -> Pair:
        block = self.blocks[index]
        if self._weights:
            self._weights.enter(index, index + 1)
        attended = attend(*how.before(block, hidden, text, temb, rotary))
        pair = self._after(how, block, hidden, text, temb, attended.out)
        keep(attended)
        if self._weights:
            self._weights.leave(index)
        return pair

    def _after(self, how: Pieces, block: nn.Module, *sources: Tensor) -> Pair:
        if self.measures.in_parts:
            return after_in_parts(how, block, *sources)
        pair: Pair = how.after(block, *sources)
        return pair

    def record(
        self, index: int, hidden: Tensor, text: Tensor, temb: Tensor, rotary: Rotary
    ) -> tuple[Pair, _Record]:
        """Run a block without a graph, and keep what the measures say."""
        kept_hidden = self._pool.put(hidden) if self.measures.inputs == "host" else hidden
        record = _Record(index, kept_hidden, text, temb, rotary, self._last if index else None)

        def keep(attended: Attended) -> None:
            if self.measures.attention is None:
                return
            record.out = self._pool.put(attended.out) if self.measures.attention == "host" else attended.out
            attended.out = attended.out.new_empty(0)
            record.attended = attended

        pair = self._run(self._trained, index, hidden, text, temb, rotary, keep)
        self._last = record
        return pair, record

    def backward(self, record: _Record, grads: Pair, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of (hidden, text, temb, trained parameters) of a block, None where not needed.

        Args:
            needs: Whether each of these needs a gradient.
        """
        block, found = self.blocks[record.index], GradientSum(needs)
        if self._weights:
            self._weights.enter(record.index, record.index - 1)
        self._fetch(record)
        sources = [self._back(record.hidden), record.text, record.temb]
        attended = record.attended
        if attended is not None and record.out is not None:
            attended.out = self._back(record.out)
        if record.before is not None:
            self._fetch(record.before)
        self._backward_through(block, sources, record.rotary, attended, grads, found)
        record.attended = record.out = None
        if self._weights:
            self._weights.leave(record.index)
        return found.grads

    def _backward_through(
        self,
        block: nn.Module,
        sources: Sequence[Tensor],
        rotary: Rotary,
        attended: Attended | None,
        grads: Pair,
        found: GradientSum,
    ) -> None:
        """Through the whole block; ``attended`` where it was kept."""
        how, in_parts = self._trained, self.measures.in_parts

        def heads_of() -> tuple[list[Tensor], tuple[Tensor, ...]]:
            with torch.set_grad_enabled(not in_parts):
                inputs = leaves(sources, found.needs)
                return inputs, how.before(block, *inputs, rotary)

        made = None
        if attended is None:
            made = heads_of()
            attended = attend(*(head.detach() for head in made[1]))
        grad_out = self._backward_after(block, sources, attended.out, grads, found)
        inputs, heads = made or heads_of()
        head_grads = [*attend_backward(attended, grad_out, *(head.detach() for head in heads))]
        attended.out = grad_out.new_empty(0)
        del grad_out
        if in_parts:
            del made, heads
            backward_before_in_parts(how, block, sources, _trained(block), rotary, head_grads, found)
        else:
            found.add([*inputs, *_trained(block)], heads, head_grads)

    def _backward_after(
        self, block: nn.Module, sources: Sequence[Tensor], out: Tensor, grads: Pair, found: GradientSum
    ) -> Tensor:
        """Through what comes after attention; returns the gradient of the attention output."""
        how = self._trained
        if self.measures.in_parts:
            return backward_after_in_parts(how, block, sources, _trained(block), out, grads, found)
        given: Sequence[Tensor] = grads
        with torch.enable_grad():
            inputs = leaves(sources, found.needs)
            out = out.detach().requires_grad_()
            if can_skip_last(block, inputs[2]):
                *outputs, gate, text_gate = how.middle(block, *inputs, out)
            else:
                outputs, gate = how.after(block, *inputs, out), None
        if gate is not None:
            given = (*grads, how.skip_last(block, *grads, gate.detach(), text_gate.detach()))
        grad = found.add([*inputs, *_trained(block)], outputs, given, out)
        assert grad is not None
        return grad

    def _fetch(self, record: _Record) -> None:
        for kept in (record.out, record.hidden):
            if isinstance(kept, Kept):
                self._pool.fetch(kept)

    def _back(self, kept: Tensor | Kept) -> Tensor:
        return self._pool.get(kept) if isinstance(kept, Kept) else kept


def _trained(block: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


class _BlockStep(torch.autograd.Function):
    """One block in the autograd graph. Its parameters are inputs, so that data parallelism sees their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        runner: BlockRunner,
        index: int,
        rotary: Rotary,
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        *parameters: nn.Parameter,
    ) -> Pair:
        _ = parameters
        pair, ctx.record = runner.record(index, hidden, text, temb, rotary)
        ctx.runner = runner
        return pair

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_text: Tensor) -> Any:
        record, ctx.record = ctx.record, None
        grads = ctx.runner.backward(record, (grad_hidden, grad_text), ctx.needs_input_grad[3:])
        return None, None, None, *grads


def install(transformer: Any, measures: Measures, device: torch.device, kept_bytes: int = 0) -> BlockRunner:
    """Make the blocks of a ``CogVideoXTransformer3DModel`` run under ``measures``, and put the model on ``device``.

    Call it after the LoRA is added. Blocks whose frozen weights stay on the host are not moved. Those to be kept in
    8 bits may have been loaded so.

    Args:
        kept_bytes: Size of the largest tensor that will be kept in host memory, if known.
    """
    transformer.gradient_checkpointing = False
    blocks = list(transformer.transformer_blocks)
    frozen = [p for block in blocks for p in block.parameters() if not p.requires_grad]
    stay = frozen if measures.streams else []
    if measures.storage == "int8":
        home = home_of(measures, device)
        for parameter in frozen:
            if parameter.ndim == 2:  # norms' scales and biases are as good as nothing
                put_in_int8(parameter, home)
    move_without(transformer, stay, device)
    runner = BlockRunner(blocks, measures, device, kept_bytes)
    for index, block in enumerate(blocks):
        block.forward = _forward(runner, index)
    if stay:  # data parallelism wants all parameters on one device, and has nothing to do with these
        owned = {id(parameter) for parameter in stay}
        names = [name for name, parameter in transformer.named_parameters() if id(parameter) in owned]
        transformer._ddp_params_and_buffers_to_ignore = names
    return runner


def home_of(measures: Measures, device: torch.device) -> torch.device:
    """Where the blocks' frozen weights are kept."""
    return torch.device("cpu") if measures.weights == "host" else device


def _forward(runner: BlockRunner, index: int) -> Callable[..., Pair]:
    def forward(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Pair:
        _ = attention_kwargs
        return runner.forward(index, hidden_states, encoder_hidden_states, temb, image_rotary_emb)

    return forward
