"""What SIGTERM does where nothing finishes a step first: one line, and the end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["STOPPED", "telling_of_sigterm"]

STOPPED = "Stopped. What is finished stays; the same command goes on from there."
_CURSOR = "\x1b[?25h"
"""Shows the cursor of a terminal, which a progress bar hides."""


@contextmanager
def telling_of_sigterm() -> Iterator[None]:
    """Inside, this process says :data:`STOPPED` before SIGTERM ends it. A handler that is there stays.

    For the main thread.

    Nothing is cleaned up: that could wait for a server, and whoever sends SIGTERM soon sends SIGKILL. Every file is
    written so that a kill at any moment is safe. The process dies by the signal (143 to a shell), as without this.
    """
    process = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == process:  # a child that was forked says nothing
            os.write(2, f"{_CURSOR if sys.stderr.isatty() else ''}\n{STOPPED}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
