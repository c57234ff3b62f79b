"""A thread behind the encoder: it reads results off the device and writes them, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

__all__ = ["Behind"]

_WAITING = 2


class Behind:
    """Does jobs in order in one thread; the first error stops the run.

    :meth:`do` returns while at most two jobs are not done. A job begins with the wait for its result, so the device
    has always one more piece to work on while the thread that feeds it waits here, and results in memory are few.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[Future[None]] = deque()

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
        self._pending.append(self._pool.submit(job, *args))
        self._settle(_WAITING)

    def _settle(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            self._pending.popleft().result()
