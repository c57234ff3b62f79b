"""AdamW with its state in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cogcache.allocator import host_memory

__all__ = ["HostAdamW"]

_CHUNK_BYTES = 64 << 20
_MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose moments lie in page-locked host memory and visit the device a few at a time.

    The arithmetic is that of torch's own update, on the device, so results are the same.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters that have a gradient.

        Raises:
            ValueError: if a closure is given: the loss is never computed anew here.
        """
        if closure is not None:
            raise ValueError("HostAdamW takes no closure")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for chunk in _chunks([p for p in group["params"] if p.grad is not None]):
                states = [self.state_of(p) for p in chunk]
                means, squares = (
                    [
                        state[name].to(p.device, non_blocking=True)
                        for p, state in zip(chunk, states, strict=True)
                    ]
                    for name in _MOMENTS
                )
                adamw(
                    chunk,
                    [p.grad for p in chunk if p.grad is not None],
                    means,
                    squares,
                    [],
                    [state["step"] for state in states],
                    fused=group["fused"],
                    found_inf=getattr(self, "found_inf", None),
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                for name, values in zip(_MOMENTS, (means, squares), strict=True):
                    for state, value in zip(states, values, strict=True):
                        state[name].copy_(value, non_blocking=True)

    def settle(self) -> None:
        """Wait until the state on the host is that of the last step."""
        for device in {p.device for group in self.param_groups for p in group["params"]}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """``step``, ``exp_avg`` and ``exp_avg_sq`` of a parameter, zeros at first, on the host."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # where a fused update counts
            for name in _MOMENTS:
                count = parameter.numel() * parameter.element_size()
                flat = host_memory(count, parameter.device).zero_()
                state[name] = flat.view(parameter.dtype).view(parameter.shape)
        return state


def _chunks(parameters: list[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    size = 0
    for parameter in parameters:
        chunk.append(parameter)
        size += parameter.numel() * parameter.element_size()
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
