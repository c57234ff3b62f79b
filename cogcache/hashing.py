"""Content hashes of files, computed once and remembered as long as the file is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from cogcache.errors import ModelError
from cogcache.memory import remembered

__all__ = ["content_id", "file_sha256", "weights_sha256"]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    return remembered("sha256", path, _read_sha256)


def content_id(path: Path) -> str:
    """Hex sha256 of a file's bytes, or where it cannot be read a text that says so and belongs to it alone."""
    try:
        return file_sha256(path)
    except OSError as error:
        return f"unreadable {path}: {error.strerror or error}"


def weights_sha256(folder: Path) -> str:
    """Hex sha256 over the names and contents of a component's safetensors files.

    Raises:
        ModelError: if there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no .safetensors weights.", "Pickled weights (.bin, .pt) are never loaded."
        )
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def _read_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return _sha256(stream)


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
