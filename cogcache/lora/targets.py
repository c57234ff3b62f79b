"""Which layers get a LoRA, and of which rank: how the settings are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PRESETS", "RankPattern", "name_targets", "parse_rank_pattern", "pick_layers", "plain_targets"]

PRESETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "attention+ff": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
}
_REGEX = "re:"


def plain_targets(targets: Sequence[str]) -> list[str]:
    """``targets`` with presets written out, each once, in order.

    Raises:
        ValueError: if a regular expression is not one.
    """
    plain = list(dict.fromkeys(one for target in targets for one in PRESETS.get(target, (target,))))
    for target in plain:
        if target.startswith(_REGEX):
            _compiled(target.removeprefix(_REGEX))
    return plain


def pick_layers(target: str, layers: Sequence[str]) -> list[str]:
    """The layers that ``target`` means: the end of a name at a dot, or ``re:`` and what the whole name matches."""
    if target.startswith(_REGEX):
        pattern = _compiled(target.removeprefix(_REGEX))
        return [layer for layer in layers if pattern.fullmatch(layer)]
    return [layer for layer in layers if layer == target or layer.endswith("." + target)]


def name_targets(layers: Sequence[str], blocks: int) -> list[str]:
    """The shortest targets for ``layers``: name endings if each of the ``blocks`` has them, else full names."""
    parts = [re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer) for layer in layers]
    endings = sorted({part[2] for part in parts if part})
    every = {f"transformer_blocks.{number}.{ending}" for number in range(blocks) for ending in endings}
    return endings if every == set(layers) else sorted(layers)


@dataclass(frozen=True)
class RankPattern:
    """Layers with a rank of their own. ``alpha`` ``None``: such that alpha / rank is that of the other layers.

    ``pattern`` is a regular expression for the end of a layer's name at a dot, as PEFT takes it.
    """

    pattern: str
    rank: int
    alpha: float | None = None

    def __str__(self) -> str:
        return f"{self.pattern}={self.rank}" + ("" if self.alpha is None else f":{self.alpha!r}")

    def fits(self, layer: str) -> bool:
        """Whether it is about ``layer``."""
        return re.match(rf"(.*\.)?({self.pattern})$", layer) is not None


def parse_rank_pattern(text: str) -> RankPattern:
    """Read ``to_q=64`` or ``to_q=64:32`` (rank, alpha).

    Raises:
        ValueError: if it is not of that form.
    """
    match = re.fullmatch(r"(.+)=(\d+)(?::(\d+(?:\.\d+)?(?:e[+-]?\d+)?))?", text)
    if not match or not int(match[2]) or (match[3] and not float(match[3])):
        raise ValueError(f"{text!r}: give name=rank or name=rank:alpha, such as to_q=64 or to_q=64:32")
    _compiled(match[1])
    return RankPattern(match[1], int(match[2]), float(match[3]) if match[3] else None)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
