"""Bytes of a file of the Hugging Face hub: one request each, and no more bytes than were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cogcache.errors import CacheError

__all__ = ["fetch_part", "fetch_whole", "quiet_uploads"]

_PARTIAL, _PAST_END = 206, 416


def fetch_whole(fs: Any, path: str) -> bytes:
    """A whole file.

    Args:
        fs: huggingface_hub's ``HfFileSystem``.
        path: As it takes it: ``datasets/user/repo@revision/folder/file``.
    """
    return _read(fs, path, {}, 0)


def fetch_part(fs: Any, path: str, start: int, size: int) -> bytes:
    """``size`` bytes from ``start``, 1 or more; fewer only at the end of the file.

    The library's own way lists the folder first, reads 5 MB ahead, and repeats for half a minute without a word.

    Raises:
        CacheError: if the server sends the whole file instead.
    """
    return _read(fs, path, {"Range": f"bytes={start}-{start + size - 1}"}, start)[:size]


@contextmanager
def quiet_uploads() -> Iterator[None]:
    """Within this, huggingface_hub draws no bar for each file, unless the user insists on them."""
    from huggingface_hub import constants, utils

    leave = utils.are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False
    if not leave:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if not leave:
            utils.enable_progress_bars()


def _read(fs: Any, path: str, headers: dict[str, str], start: int) -> bytes:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers |= fs._api._build_hf_headers()
    answer = get_session().get(_address(fs, path), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    if answer.status_code == _PAST_END:
        return b""
    hf_raise_for_status(answer)
    if start and answer.status_code != _PARTIAL:
        raise CacheError(
            f"{fs.endpoint} does not answer requests for parts of a file.", "Copy the cache to a folder."
        )
    return bytes(answer.content)


def _address(fs: Any, path: str) -> str:
    """Where the bytes are. It asks the server whether repository and revision exist, once."""
    from huggingface_hub import hf_hub_url

    where = fs.resolve_path(path)
    if not hasattr(where, "repo_id"):  # a bucket, which has no revisions
        return str(fs.url(path))
    kind = {"repo_type": where.repo_type, "revision": where.revision, "endpoint": fs.endpoint}
    return str(hf_hub_url(where.repo_id, where.path_in_repo, **kind))
