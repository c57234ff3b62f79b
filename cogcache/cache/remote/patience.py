"""Asking a server again while it does not answer, and telling apart what only waiting, or only the user, can mend."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from cogcache.errors import CacheError
from cogcache.location import Url
from cogcache.progress import say

__all__ = ["Patience", "credentials_hint"]

T = TypeVar("T")

_FIRST_WAIT_S, _LONGEST_WAIT_S, _QUIET_S = 0.2, 10.0, 1.0
_STRANGER_S = 30.0
"""For how long a server is asked that has never answered: that is rather a wrong address than an outage."""
_LIBRARIES = {
    "aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "httpcore", "httpx", "huggingface_hub",
    "requests", "urllib3",
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
    "DefaultCredentialsError", "RefreshError", "LocalTokenNotFoundError", "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}  # fmt: skip
_WRONG_ADDRESS = {
    "OfflineModeIsEnabled", "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError", "ParamValidationError",
    "HFValidationError",
}  # fmt: skip
_NOT_TRUSTED = {"ClientConnectorCertificateError", "SSLCertVerificationError"}
_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run 'aws configure'; for a server that is not Amazon's "
    "also AWS_ENDPOINT_URL. For a public bucket set FSSPEC_S3_ANON=true.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run 'gcloud auth application-default login'.",
    "hf": "Set HF_TOKEN, or run 'hf auth login', with a token that may use this repository.",
}

_ENDPOINTS = {"s3": ["AWS_ENDPOINT_URL"], "gs": ["STORAGE_EMULATOR_HOST"], "hf": ["HF_ENDPOINT"]}
"""Environment variables that lead to another server."""


def certificate_hint(url: Url) -> str:
    """What to set where the server's certificate is of an authority that this machine does not know."""
    variable = "AWS_CA_BUNDLE" if url.protocol == "s3" else "SSL_CERT_FILE"
    return (
        "This machine does not trust the server's certificate. Check the address; for an authority of your own, "
        f"let {variable} name a file with its certificate."
    )


def credentials_hint(url: Url) -> str:
    """What to set where the server wants to know who asks."""
    return _CREDENTIALS.get(url.protocol, "Give an address that can be read without a login.")


class Patience:
    """Calls that are repeated while ``url`` does not answer, for up to ``seconds`` an outage. Thread-safe.

    An outage lasts from the first call that fails until one that does not. It is told once, when it is longer than a
    moment, and once more when it is over. A server that has never answered, not even with an error, gets half a minute.

    Args:
        known: Whether it has answered before, in another process perhaps.
    """

    def __init__(self, url: Url, seconds: float, known: bool = False) -> None:
        self._url, self._seconds = url, seconds
        self.known = known
        self._lock = threading.Lock()
        self._since: float | None = None
        self._told = False

    def call(self, function: Callable[[], T]) -> T:
        """The result of ``function``.

        Raises:
            FileNotFoundError: if the server says that there is no such thing.
            CacheError: if it refuses, or has not answered for too long.
        """
        for wait in _waits():
            began = time.monotonic()
            try:
                result = function()
            except Exception as error:
                self._check(error)
                time.sleep(self._count(error, wait, time.monotonic() - began))
            else:
                self._answered()
                return result
        raise AssertionError("waits never end")

    def _check(self, error: Exception) -> None:
        """Return if it is worth waiting; raise what the error means if not."""
        chain = list(_chain(error))
        names = {type(link).__name__ for link in chain}
        statuses = {status for link in chain if (status := _status(link))}
        nothing_there = 404 in statuses or any(isinstance(link, FileNotFoundError) for link in chain)
        self.known |= bool(statuses) or nothing_there
        if names & _NO_CREDENTIALS:
            raise self._refusal("no credentials for", error, credentials_hint(self._url)) from error
        if statuses & {401, 403} or any(isinstance(link, PermissionError) for link in chain):
            raise self._refusal("no access to", error, credentials_hint(self._url)) from error
        if nothing_there:
            raise FileNotFoundError(errno.ENOENT, "the server has no such file") from error
        if not isinstance(error, OSError) and not any(map(_is_of_library, chain)):
            raise error
        if names & _NOT_TRUSTED:
            raise self._refusal("no use of", error, certificate_hint(self._url)) from error
        if names & _WRONG_ADDRESS or (statuses and not any(map(_may_pass, statuses))):
            raise self._refusal("no use of", error, "Check the address.") from error

    def _refusal(self, what: str, error: Exception, hint: str) -> CacheError:
        return CacheError(f"{what} {self._url}: {_reason(error)}.", hint)

    def _count(self, error: Exception, wait: float, took: float) -> float:
        """How long to sleep now, in seconds, after a call that failed and ``took`` so many."""
        now = time.monotonic()
        with self._lock:
            if self._since is None:
                self._since = now
            waited = now - self._since
            limit = self._seconds if self.known else min(self._seconds, _STRANGER_S)
            if waited >= limit:
                raise self._silence(waited, error) from error
            if took + waited + wait >= _QUIET_S and not self._told:
                self._told = True
                say(f"{self._url} does not answer ({_reason(error)}). Waiting for it, up to {limit:.0f} s.")
            return min(wait, limit - waited)

    def _silence(self, waited: float, error: Exception) -> CacheError:
        hint = "Nothing is lost: run the same command again when it does (train: with --resume latest)."
        if not self.known:
            what = ", ".join(["the address", "the network", *_ENDPOINTS.get(self._url.protocol, [])])
            hint = f"It has never answered: check {what}. {hint}"
        return CacheError(f"{self._url} has not answered for {waited:.0f} s: {_reason(error)}.", hint)

    def _answered(self) -> None:
        self.known = True
        if self._since is None:
            return
        with self._lock:
            if self._told and self._since is not None:
                say(f"{self._url} answers again after {time.monotonic() - self._since:.0f} s; going on.")
            self._since, self._told = None, False


def _waits() -> Iterator[float]:
    """Seconds between tries: doubling up to a limit, each drawn so that many clients do not ask at once."""
    wait = _FIRST_WAIT_S
    while True:
        yield wait * random.uniform(0.5, 1.0)
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _status(error: BaseException) -> int:
    """The HTTP status that an exception of any of the libraries holds; 0 for none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = (
            getattr(response, "status_code", None)
            or getattr(error, "status", None)
            or getattr(error, "code", None)
        )
    return int(found) if str(found).isdigit() and 100 <= int(found) < 600 else 0


def _may_pass(status: int) -> bool:
    """Whether a server that answers so is only overloaded or away."""
    return status >= 500 or status in (408, 425, 429)


def _is_of_library(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0].rstrip("0123456789") in _LIBRARIES


def _reason(error: Exception) -> str:
    """One short line."""
    text = " ".join(str(error).split())[:200].rstrip(".")
    return text or type(error).__name__
