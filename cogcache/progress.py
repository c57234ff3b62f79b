"""Telling how far a long run is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress", "console", "say"]

_LINE_EVERY_S = 30.0


def console() -> Console:
    """The console for messages: standard error, so that standard output stays for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line for the user."""
    console().print(text, markup=False)


class Progress:
    """Progress over ``total`` things called ``unit``; a context manager.

    Args:
        title: What is being done.
        total: How many things there are.
        unit: Their name in the plural, for the rate: ``"clips"`` gives clips/s.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task(title, total=total, note="") if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None or self.done:
            say(self._line())

    def advance(self, amount: int = 1, **notes: object) -> None:
        """Count ``amount`` more as done; ``notes`` (name=value) are shown beside the rate."""
        self.done += amount
        self._note = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in notes.items())
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=f"{self._rate()} {self._note}")
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            say(self._line())

    def _rate(self) -> str:
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        return f"{rate:.2f} {self.unit}/s" if rate < 100 else f"{rate:.0f} {self.unit}/s"

    def _line(self) -> str:
        return "  ".join(
            part for part in (f"{self.title}: {self.done}/{self.total}", self._rate(), self._note) if part
        )


def _bar() -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
    )
