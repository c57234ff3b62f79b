"""Small pieces of the sentences that users read."""

from __future__ import annotations

__all__ = ["counted", "where_they_differ"]

_BEFORE, _SHOWN = 20, 50


def counted(count: int, one: str, many: str = "") -> str:
    """``1 clip``, ``0 clips``, ``2 entries``; ``many`` where the plural is not ``one`` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def where_they_differ(was: str, now: str) -> tuple[str, str]:
    """Both texts in quotes, cut to a part that begins shortly before their first difference."""
    same = next(
        (i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now))
    )
    start = max(0, same - _BEFORE)
    return _part(was, start), _part(now, start)


def _part(text: str, start: int) -> str:
    end = start + _SHOWN
    return f"{'...' if start else ''}{text[start:end]!r}{'...' if len(text) > end else ''}"
