"""For how long a server is asked that does not answer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest

from cogcache.cache.remote import patience
from cogcache.cache.remote.patience import Patience
from cogcache.cache.remote.storage import RemoteOptions, RemoteStorage
from cogcache.errors import CacheError
from cogcache.location import Url

URL = Url("s3://bucket/clips")


class Clock:
    """Takes the place of :mod:`time`: sleeping takes none."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


class StatusError(OSError):
    """As the libraries tell a server's refusal."""

    def __init__(self, status: int) -> None:
        self.status = status


def refuse() -> None:
    raise ConnectionRefusedError(111, "Connection refused")


def given_up(asked: Patience) -> CacheError:
    with pytest.raises(CacheError) as caught:
        asked.call(refuse)
    return caught.value


def missing() -> None:
    raise FileNotFoundError


def overloaded(tries: int) -> Callable[[], None]:
    """Answers with 503 so often, then refuses every connection."""
    answers = iter([StatusError(503)] * tries)

    def answer() -> None:
        raise next(answers, ConnectionRefusedError(111, "Connection refused"))

    return answer


def test_a_server_that_has_never_answered_is_rather_a_wrong_address(clock: Clock) -> None:
    error = given_up(Patience(URL, 600))
    assert clock.now == 30
    assert error.message.startswith("s3://bucket/clips has not answered for 30 s: ")
    assert "check the address" in str(error.hint)
    assert given_up(Patience(URL, 5)).message.startswith("s3://bucket/clips has not answered for 5 s: ")


def test_a_call_that_takes_long_to_fail_is_told_at_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub repeats some requests for half a minute by itself."""
    said: list[str] = []
    monkeypatch.setattr(patience, "say", said.append)
    results = iter([refuse, lambda: None])

    def slow() -> None:
        clock.now += 23
        next(results)()

    Patience(URL, 20, known=True).call(slow)
    assert [text.partition(" (")[0] for text in said] == [
        "s3://bucket/clips does not answer",
        "s3://bucket/clips answers again after 23 s; going on.",
    ]


def test_one_that_has_answered_gets_all_of_the_patience(clock: Clock) -> None:
    asked = Patience(URL, 600)
    assert asked.call(lambda: 7) == 7
    error = given_up(asked)
    assert clock.now == 600
    assert "check the address" not in str(error.hint)
    given_up(Patience(URL, 600, known=True))
    assert clock.now == 1200


def test_a_refusal_is_an_answer_too(clock: Clock) -> None:
    asked = Patience(URL, 600)
    with pytest.raises(FileNotFoundError):
        asked.call(missing)
    given_up(asked)
    assert clock.now == 600
    with pytest.raises(CacheError, match="has not answered for 600 s"):
        Patience(URL, 600).call(overloaded(2))


def test_copies_in_other_processes_know_that_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage(Url("memory://known/clips"), RemoteOptions())
    assert not copy.copy(storage).connection.known
    storage.size("cache.json")
    assert copy.copy(storage).connection.known
    before, process = storage.connection, os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)  # as after a fork
    assert storage.connection is not before
    assert storage.connection.known
