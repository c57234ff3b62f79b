"""gcsfs as it is used here: nothing repeated, each refusal told for what it is, the plain JSON interface."""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cogcache.errors import CacheError

__all__ = ["open_google"]

_KEY_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_BAD_REQUEST = 400


def open_google(**options: Any) -> Any:
    """gcsfs's file system over the JSON interface.

    Not the one that ``fsspec.filesystem("gs")`` gives: that one asks for the kind of a bucket by gRPC before every
    request, again and again where it may not know (a public bucket, read without credentials). It would be needed for
    zonal buckets alone.

    Raises:
        CacheError: if the file of credentials that the user names is not there; gcsfs would go on without any.
    """
    from gcsfs.core import GCSFileSystem

    named = os.environ.get(_KEY_FILE, "")
    if named and not Path(named).is_file():
        raise CacheError(f"{_KEY_FILE} names {named}, which is no file.", "Give a key file, or unset it.")
    fs = GCSFileSystem(**options)
    fs._request = _asked_once(fs)
    return fs


def _asked_once(fs: Any) -> Callable[..., Awaitable[Any]]:
    """gcsfs's request without its six tries of up to a minute: :class:`Patience` asks again, and tells."""
    from gcsfs.retry import HttpError

    request = inspect.unwrap(type(fs)._request)

    async def asked(*arguments: Any, **named: Any) -> Any:
        try:
            return await request(fs, *arguments, **named)
        except OSError as error:
            if str(error).startswith("Forbidden: "):  # gcsfs's word for 403, which has no status
                raise PermissionError(str(error)) from error
            raise
        except ValueError as error:
            if type(error) is ValueError:  # gcsfs's word for some answers of 400
                raise HttpError({"code": _BAD_REQUEST, "message": str(error)}) from error
            raise

    return asked
