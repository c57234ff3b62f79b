"""Readers of the listed layouts: text lists matched by line, and metadata tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cogcache.errors import DatasetError

__all__ = ["Row", "is_text", "read_lines", "read_lists", "read_metadata", "read_text"]


@dataclass(frozen=True)
class Row:
    """One listed clip; ``where`` names file and line for error messages."""

    where: str
    video: str
    caption: str
    image: str | None = None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, line ends as stored.

    Raises:
        DatasetError: if it is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path.name} is missing") from None
    except OSError as error:
        raise DatasetError(f"{path.name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DatasetError(f"{path.name} line {line}: not UTF-8 text") from None


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: names of files and escapes in JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(path: Path, mistakes: list[str]) -> list[str] | None:
    """The lines of a list, stripped; ``None`` if it cannot be read. What is wrong is added to ``mistakes``.

    Only ``\\n`` and ``\\r\\n`` end a line: ``str.splitlines`` would also split at characters that captions
    may hold (vertical tab, U+2028), and shift all that follow.
    """
    try:
        text = read_text(path)
    except DatasetError as error:
        mistakes.append(error.message)
        return None
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    lines = [line.strip() for line in lines]
    if not lines:
        mistakes.append(f"{path.name} is empty")
        return None
    mistakes += [f"{path.name} line {n}: blank line" for n, line in enumerate(lines, 1) if not line]
    return lines


def read_lists(root: Path, mistakes: list[str]) -> list[Row]:
    """Read ``videos.txt`` and ``prompts.txt`` (and ``images.txt``, if there), matched by line number.

    Mistakes are added to ``mistakes``; rows with a blank in them are left out.
    """
    names = ["videos.txt", "prompts.txt"]
    if (root / "images.txt").exists():
        names.append("images.txt")
    lists = [read_lines(root / name, mistakes) for name in names]
    lengths = {name: len(lines) for name, lines in zip(names, lists, strict=True) if lines is not None}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        mistakes.append(f"the lists differ in their number of lines: {counts}")
    rows = []
    for number, (video, caption, *image) in enumerate(zip_longest(*(lines or [] for lines in lists)), 1):
        if video:
            # A row without caption is kept so that a missing file is reported in the same go.
            rows.append(Row(f"videos.txt line {number}", video, caption or "", (image or [None])[0] or None))
    return rows


def read_metadata(root: Path, mistakes: list[str]) -> list[Row]:
    """Read ``metadata.jsonl`` or ``metadata.csv``.

    Mistakes are added to ``mistakes``; rows that have one are left out.
    """
    paths = [root / name for name in ("metadata.jsonl", "metadata.csv") if (root / name).exists()]
    if len(paths) != 1:
        mistakes.append(
            "both metadata.jsonl and metadata.csv are there: keep one"
            if paths
            else "neither metadata.jsonl nor metadata.csv is there"
        )
        return []
    path = paths[0]
    try:
        text = read_text(path)
        records = list((_json_records if path.suffix == ".jsonl" else _csv_records)(path.name, text))
    except DatasetError as error:
        mistakes.append(error.message)
        return []
    if not records:
        mistakes.append(f"{path.name} lists no clips")
    rows = (_row(f"{path.name} line {line}", record, mistakes) for line, record in records)
    return [row for row in rows if row is not None]


def _json_records(name: str, text: str) -> Iterator[tuple[int, Any]]:
    """(line number, parsed value), or (line number, reason) where a line is not JSON."""
    del name
    if not text.strip():
        return
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if not line.strip():
            yield number, "blank line"
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, value if isinstance(value, dict) else "not a JSON object"


def _csv_records(name: str, text: str) -> Iterator[tuple[int, Any]]:
    """(line number, row), or (line number, reason) where the number of fields is wrong.

    Raises:
        DatasetError: if a column is missing from the header, or the quotes do not match.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        missing = [column for column in ("file_name", "text") if header.count(column) != 1]
        if missing:
            raise DatasetError(f"{name} line 1: needs one column {' and one column '.join(missing)}")
        line = reader.line_num + 1
        for fields in reader:
            if not fields:
                yield line, "blank line"
            elif len(fields) != len(header):
                yield line, f"{len(fields)} fields where the header has {len(header)}"
            else:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(f"{name} line {reader.line_num}: {error}") from None


def _row(where: str, record: Any, mistakes: list[str]) -> Row | None:
    if isinstance(record, str):
        mistakes.append(f"{where}: {record}")
        return None
    reasons = []
    for column in ("file_name", "text"):
        value = record.get(column)
        if not isinstance(value, str) or not value.strip():
            reasons.append(f"{where}: {column} is {'missing' if value is None else 'not a non-empty text'}")
        elif not is_text(value):
            reasons.append(f"{where}: {column} holds half a character (a lone surrogate)")
    image = record.get("image")
    if image is not None and not (isinstance(image, str) and is_text(image)):
        reasons.append(f"{where}: image is not a text")
    mistakes += reasons
    if reasons:
        return None
    return Row(where, record["file_name"].strip(), record["text"].strip(), (image or "").strip() or None)
