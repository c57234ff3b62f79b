"""The GPU and the host that are planned for: those that are here, those described by flags, or typical cards."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch

from cogcache.errors import ConfigError
from cogcache.train.memory.choose import free_memory
from cogcache.train.memory.estimate import Need
from cogcache.train.memory.gpus import CARDS, Card, find_card, given_rates, measured_rates
from cogcache.train.memory.speed import Rates

__all__ = ["Target", "choose_targets"]

_CONTEXT = int(0.6 * 2**30)
"""What CUDA itself, and a screen, take of a card."""
_SYSTEM = 2 * 2**30
"""What the system and the Python process take of the host."""
_TYPICAL = ("RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090", "L40S", "H100")
"""8, 12, 16, 24, 48 and 80 GB."""
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Target:
    """A GPU and its host. ``rates`` are None where nothing is known of its speed.

    Attributes:
        free: Bytes that training may count on.
        host_known: Whether the host's memory is known; if not, ``free.host`` has no end.
    """

    name: str
    free: Need
    rates: Rates | None
    host_known: bool

    @property
    def measured(self) -> bool:
        """Whether it is the GPU here."""
        return self.rates is not None and self.rates.source.startswith("measured")


def choose_targets(
    gpu: str | None,
    gpu_memory: float | None,
    gpu_tflops: float | None,
    link: float | None,
    host_memory: float | None,
) -> list[Target]:
    """One target, or, where no GPU is here and none is described, typical cards.

    Args:
        gpu_memory: In GB, as makers count it (2^30 bytes); so is ``host_memory``.
        gpu_tflops: Dense bfloat16 TFLOP/s of its datasheet.
        link: GB/s between host and GPU.

    Raises:
        ConfigError: if ``gpu`` is none that is known and its speed or memory is not given, or if a number is
            not finite.
    """
    if not all(isfinite(value) for value in (gpu_memory, gpu_tflops, link, host_memory) if value is not None):
        raise ConfigError(
            "--gpu-memory, --gpu-tflops, --link and --host-memory must be finite.",
            "Leave out what is unlimited.",
        )
    host = _UNLIMITED if host_memory is None else max(int(host_memory * 2**30) - _SYSTEM, 0)
    known = host_memory is not None
    if gpu is None and gpu_memory is None and gpu_tflops is None:
        if torch.cuda.is_available():
            return [_here(host if known else None)]
        return [_card(card, host, known, link) for name in _TYPICAL for card in CARDS if card.name == name]
    card = _described(gpu, gpu_memory, gpu_tflops)
    memory = gpu_memory if gpu_memory is not None else card.gb if card else None
    if memory is None:
        raise ConfigError("how much memory does that GPU have?", "Add --gpu-memory, in GB.")
    free = Need(max(int(memory * 2**30) - _CONTEXT, 0), host)
    name = gpu or (f"{card.name} or alike" if card and not gpu_tflops else "a GPU")
    rates = given_rates(gpu_tflops, card, link) if gpu_tflops else _rates(card, link) if card else None
    return [Target(f"{name} ({memory:g} GB)", free, rates, known)]


def _described(gpu: str | None, gpu_memory: float | None, gpu_tflops: float | None) -> Card | None:
    """The card named; else, where no speed is given, a typical one of that memory."""
    if gpu is not None:
        card = find_card(gpu)
        if card is None and (gpu_memory is None or gpu_tflops is None):
            names = ", ".join(card.name for card in CARDS)
            raise ConfigError(
                f"{gpu!r:.60} is not a GPU that is known here: {names}.",
                "Describe another by --gpu-memory (GB) and --gpu-tflops (dense bfloat16, of its datasheet).",
            )
        return card
    if gpu_tflops is not None or gpu_memory is None:
        return None
    typical = [card for name in _TYPICAL for card in CARDS if card.name == name]
    smaller = [card for card in typical if card.gb <= gpu_memory]
    return smaller[-1] if smaller else typical[0]


def _card(card: Card, host: int, known: bool, link: float | None) -> Target:
    free = Need(card.gb * 2**30 - _CONTEXT, host)
    return Target(f"{card.name} ({card.gb} GB)", free, _rates(card, link), known)


def _rates(card: Card, link: float | None) -> Rates:
    return given_rates(card.tflops, card, link) if link else card.rates


def _here(host: int | None) -> Target:
    device = torch.device("cuda", torch.cuda.current_device())
    free = free_memory(device)
    rates = measured_rates(device)
    return Target(
        f"{torch.cuda.get_device_name(device)}, here",
        free if host is None else Need(free.device, host),
        rates,
        True,
    )
