"""CRC-32 as zlib defines it. ISA-L computes it some ten times as fast, so that checking costs next to nothing."""

from __future__ import annotations

from isal.isal_zlib import crc32

__all__ = ["crc32"]
