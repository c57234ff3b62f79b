"""Is a file all there? Told from the outermost structure of its container, without decoding.

A file that was cut off still opens, and its first frames decode; but its outermost elements say how long they
are. Sources: ISO/IEC 14496-12 (boxes), RFC 8794 and RFC 9559 (EBML, Matroska segment), Microsoft RIFF.
MPEG program and transport streams declare no length: a cut there cannot be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

__all__ = ["missing_bytes"]

_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def missing_bytes(path: Path) -> int:
    """Bytes that the container promises beyond the end of the file; 0 if it is whole or does not say."""
    length = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(12)
        stream.seek(0)
        if head[:4] == _EBML_HEADER:
            promised = _matroska_end(stream)
        elif head[:4] == b"RIFF":
            promised = 8 + int.from_bytes(head[4:8], "little")
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
            promised = _media_end(stream, length)
        else:
            promised = 0
    return max(0, promised - length)


def _media_end(stream: BinaryIO, length: int) -> int:
    """End of the last box of media or index; others are not asked, since files may carry trailing junk."""
    position = end = 0
    while position + 8 <= length:
        stream.seek(position)
        head = stream.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: to the end of the file
            break
        position += size
        if head[4:8] in (b"mdat", b"moov", b"moof"):
            end = position
    return end


def _matroska_end(stream: BinaryIO) -> int:
    """End of the segment; 0 if its size is unknown, as in a live recording."""
    if stream.read(4) != _EBML_HEADER:
        return 0
    header = _vint(stream)
    if header is None:
        return 0
    stream.seek(header, 1)
    if stream.read(4) != _SEGMENT:
        return 0
    size = _vint(stream)
    return 0 if size is None else stream.tell() + size


def _vint(stream: BinaryIO) -> int | None:
    """An EBML variable-length size; ``None`` if it is damaged or the reserved "unknown"."""
    first = stream.read(1)
    if not first or not first[0]:
        return None
    width = 9 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & ((1 << (8 - width)) - 1)]) + stream.read(width - 1), "big")
    return None if value == (1 << (7 * width)) - 1 else value
