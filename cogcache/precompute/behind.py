"""Threads behind the encoder: one reads results off the device, one writes them, both in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

__all__ = ["Behind"]


class Behind:
    """Does jobs in order in one thread; the first error stops the run.

    Args:
        waiting: So many jobs may be not done yet when :meth:`do` returns.
    """

    def __init__(self, waiting: int, name: str) -> None:
        self._waiting = waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._settle(0)

    def do(self, job: Callable[..., None], *args: Any) -> None:
        """Have ``job`` done after those before it.

        Raises:
            Exception: whatever an earlier job raised.
        """
        self._pending.append(self._pool.submit(self._run, job, *args))
        self._settle(self._waiting)

    def _run(self, job: Callable[..., None], *args: Any) -> None:
        """Nothing is done after an error: an entry behind a missing one would take its place for good."""
        if self._failed:
            return
        try:
            job(*args)
        except BaseException:
            self._failed = True
            raise

    def _settle(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            self._pending.popleft().result()
