"""What GPUs reach inside a training step: from their datasheets, or measured in about a second.

On an H200 a training step of 5B runs matrix products at 765 TFLOP/s, attention at 408, and memory at 3.84 TB/s; alone
the first two reach 775 and 419. A card that is not at hand is given the same shares of its datasheet's figures, so its
times are estimates.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cogcache.allocator import host_memory
from cogcache.train.memory.attention import attend, attend_backward
from cogcache.train.memory.speed import Rates

__all__ = ["CARDS", "Card", "find_card", "given_rates", "measured_rates", "product_rate"]


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet.

    Attributes:
        gb: Memory, GB as the maker counts (2^30 bytes).
        tflops: Dense bfloat16 matrix products with float32 accumulation, 1e12 operations a second.
        memory: Bandwidth of its memory, GB/s.
        link: Its link to the host, GB/s each way: 25 for PCIe 4 x16, 50 for PCIe 5 x16, half of that for x8.
    """

    name: str
    gb: int
    tflops: float
    memory: float
    link: float

    @property
    def rates(self) -> Rates:
        """The shares of these figures that an H200 reaches."""
        return Rates(
            _LINEAR_SHARE * self.tflops * 1e12,
            _ATTENTION_SHARE * self.tflops * 1e12,
            _MEMORY_SHARE * self.memory * 1e9,
            self.link * 1e9,
            f"datasheet of {self.name}",
        )


_LINEAR_SHARE, _ATTENTION_SHARE, _MEMORY_SHARE = 765 / 989.5, 408 / 989.5, 0.8
_LINEAR_IN_STEP, _ATTENTION_IN_STEP, _MEMORY_IN_STEP = 765 / 775, 408 / 419, 0.9
"""Shares of what was measured alone. The last is not measured: a copy is taken to reach 8/9 of the datasheet."""

CARDS = (
    Card("H200", 141, 989.5, 4800, 55),
    Card("H100 PCIe", 80, 756, 2000, 50),
    Card("H100", 80, 989.5, 3350, 55),
    Card("A100 80GB", 80, 312, 2039, 25),
    Card("A100 40GB", 40, 312, 1555, 25),
    Card("L40S", 48, 362, 864, 25),
    Card("RTX 6000 Ada", 48, 364.2, 960, 25),
    Card("RTX A6000", 48, 154.8, 768, 25),
    Card("RTX 5090", 32, 209.5, 1792, 50),
    Card("RTX 4090", 24, 165.2, 1008, 25),
    Card("RTX 3090", 24, 71.0, 936, 25),
    Card("A10", 24, 125, 600, 25),
    Card("L4", 24, 121, 300, 25),
    Card("RTX 5080", 16, 112.6, 960, 50),
    Card("RTX 4080", 16, 97.5, 717, 25),
    Card("RTX 4070", 12, 58.3, 504, 25),
    Card("RTX 3060", 12, 25.3, 360, 25),
    Card("RTX 4060", 8, 30.2, 272, 13),
)
"""NVIDIA's datasheets, and the tables of its GA102, Ada and Blackwell whitepapers."""


_OTHERS = {"laptop", "mobile", "mig", "nvl", "super", "ti", "max", "d"}


def find_card(name: str) -> Card | None:
    """The card that people or the driver call so (``NVIDIA GeForce RTX 4090``); a laptop's or a Ti is another."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if words & _OTHERS:
        return None
    return next((card for card in CARDS if set(card.name.lower().split()) <= words), None)


def given_rates(tflops: float, card: Card | None = None, link: float | None = None) -> Rates:
    """Rates of a GPU whose dense bfloat16 TFLOP/s are given; the rest is that of ``card``, or in proportion."""
    memory = card.memory if card else tflops * 4800 / 989.5
    rates = Card("", 0, tflops, memory, link or (card.link if card else 25.0)).rates
    return Rates(rates.linear, rates.attention, rates.memory, rates.link, f"{tflops:g} TFLOP/s as given")


def measured_rates(device: torch.device, size: int = 8192) -> Rates:
    """Rates of the GPU at hand, in about a second: a matrix product, attention, a copy, a copy from the host.

    Args:
        size: Rows, columns and tokens.
    """
    with torch.no_grad():
        rates = Rates(
            _LINEAR_IN_STEP * product_rate(device, size),
            _ATTENTION_IN_STEP * _attention(device, size),
            _MEMORY_IN_STEP * _copy(device, size),
            _from_host(device, size),
            "measured just now",
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rates


def product_rate(device: torch.device, size: int = 8192) -> float:
    """Operations a second of a bfloat16 matrix product of ``size`` rows and columns, alone."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / _seconds(lambda: a @ a, device)


def _attention(device: torch.device, size: int) -> float:
    heads, width = 24, 64
    q, k, v, grad = torch.randn(4, 1, size, heads, width, dtype=torch.bfloat16, device=device)

    def run() -> None:
        attend_backward(attend(q, k, v), grad, q, k, v)

    return 7 * 2 * heads * width * size**2 / _seconds(run, device)


def _copy(device: torch.device, size: int) -> float:
    a = torch.empty(2 * size * size, dtype=torch.bfloat16, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _seconds(lambda: b.copy_(a), device)


def _from_host(device: torch.device, size: int) -> float:
    host = host_memory(2 * size * size, device)
    there = torch.empty_like(host, device=device)
    return host.nbytes / _seconds(lambda: there.copy_(host, non_blocking=True), device)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Of one run, the mean of some after two that are not counted."""
    for _ in range(2):
        run()
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
