"""Seeded damage that keeps the form: JSON trees, texts and bytes with one or a few hostile places."""

from __future__ import annotations

import json
from random import Random
from typing import Any

__all__ = ["JSON_TOKENS", "NUMBERS", "STRINGS", "mutate_bytes", "mutate_json", "mutate_text", "spoil_json"]

NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 255, 256, 511, 512, 513, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 63) - 1),
    *(1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70, -(1 << 63), -(1 << 70), 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), True, False),
)
STRINGS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "..\\..\\b",
        "~",
        "~root/x",
        "C:\\x",
    ),
    *(
        "a\0b",
        "\0",
        "\n",
        "\r\n",
        "\u2028",
        "\ud800",
        "\udfff\ud800",
        "\ufeff",
        "\u202egpj",
        "e\u0301",
        "\U0010ffff",
    ),
    *(
        "x" * 300,
        "y" * 70_000,
        "latents",
        "text",
        "images",
        "latents-00000",
        "text-00000",
        "0" * 32,
        "f" * 64,
    ),
    *("0x0", "0x16", "999999x999999", "-1x2", "NaN", "1e999", "%s%n", "{}", "null", "$(touch x)", "`id`"),
    *(
        "text/../latents-00000",
        "latents-99999",
        "latents-000000000000",
        "latents-\u0661\u0661\u0661\u0661\u0661",
    ),
    *(
        "file:///etc/passwd",
        "http://localhost/x",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "CON",
        "a" * 5000 + "/b",
    ),
)
JSON_TOKENS = (
    *(
        b"1e999",
        b"-1e999",
        b"NaN",
        b"Infinity",
        b"-0",
        b"0.1",
        b"1E5",
        b"9" * 400,
        b"9" * 5000,
        b"01",
        b"+1",
        b"0x10",
    ),
    *(
        b"null",
        b"true",
        b"{}",
        b"[]",
        b'""',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"\\',
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"/**/",
    ),
    *(
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"[" * 900 + b"]" * 900,
        b'{"a":1,"a":2}',
        b",",
        b"\n",
        b"\r",
        b"\x00",
    ),
)


def scalar(random: Random) -> Any:
    """A hostile value, mostly a leaf."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind < 7:
        return random.choice(STRINGS)
    if kind == 7:
        return None
    return random.choice(
        ([], {}, [[]], {"a": {}}, [None] * 50, {"": 0}, _nested(random.choice((5, 200, 900))))
    )


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def mutate_json(value: Any, random: Random, times: int | None = None) -> Any:
    """A copy of a JSON value with a few changes, each at a place of its own."""
    value = json.loads(json.dumps(value))
    for _ in range(times or random.choice((1, 1, 1, 2, 3))):
        try:
            value = _change(value, random)
        except RecursionError:  # nested values that were nested once more
            return scalar(random)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder with every key of it, at any depth."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else ()
        )
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def _change(value: Any, random: Random) -> Any:
    places = _places(value)
    if not places or random.random() < 0.01:
        return scalar(random)
    holder, key = random.choice(places)
    old = holder[key]
    kind = random.randrange(12)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice((*STRINGS, "checksum", "__proto__", "__class__"))] = scalar(random)
    elif kind == 1:
        holder.append(json.loads(json.dumps(old)))
    elif kind == 2 and isinstance(holder, dict):
        holder[random.choice(STRINGS)] = holder.pop(key)
    elif kind == 3:
        other, place = random.choice(places)
        holder[key] = json.loads(json.dumps(other[place])) if place in _keys(other) else None
    elif kind in (4, 5) and isinstance(old, str) and old:
        holder[key] = mutate_text(old, random)
    elif kind in (4, 5, 6) and type(old) is int:
        holder[key] = old + random.choice((-513, -512, -1, 1, 512, 1 << 32, 1 << 62))
    elif kind == 7:
        holder[key] = random.choice(([old], {"": old}, str(old), [old, old]))
    else:
        holder[key] = scalar(random)
    return value


def _keys(holder: Any) -> Any:
    return holder.keys() if isinstance(holder, dict) else range(len(holder))


def mutate_text(text: str, random: Random) -> str:
    """A text with one change: cut, doubled, spliced with a hostile one, or one character another."""
    at = random.randrange(len(text) + 1)
    kind = random.randrange(5)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + text
    if kind == 2:
        return text[:at] + random.choice(STRINGS) + text[at:]
    if kind == 3:
        return (
            text[:at]
            + chr(random.choice((0, 9, 10, 13, 34, 44, 47, 58, 0x85, 0x2028, 0xFEFF, 0x1F600)))
            + text[at + 1 :]
        )
    return text[:at] + text[at + random.randrange(1, 20) :]


def spoil_json(data: bytes, random: Random) -> bytes:
    """JSON text with one token another: what no tree can say (doubled keys, NaN, endless nesting, broken UTF-8)."""
    marks = [place for place, byte in enumerate(data) if byte in b'{}[]:,"']
    if not marks:
        return random.choice(JSON_TOKENS)
    begin = random.choice(marks)
    end = random.choice((begin, begin + 1, next((m for m in marks if m > begin), begin)))
    return data[:begin] + random.choice((b"", b":", b",")) + random.choice(JSON_TOKENS) + data[end:]


def mutate_bytes(data: bytes, random: Random, times: int | None = None) -> bytes:
    """Bytes with a few changes: bits, cuts, splices, runs, and integers of all widths."""
    changed = bytearray(data)
    for _ in range(times or random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(changed) + 1)
        kind = random.randrange(8)
        if kind < 2 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            del changed[at : at + random.choice((1, 4, 64, 512, 1 << 20))]
        elif kind == 3:
            begin = random.randrange(len(changed) + 1)
            changed[at:at] = changed[begin : begin + random.choice((1, 8, 64, 512))]
        elif kind == 4:
            run = random.choice((1, 8, 100))
            changed[at : at + run] = bytes([random.choice((0, 255, 0x7F, 0x80, 0x30))]) * run
        elif kind < 7:
            width = random.choice((1, 2, 4, 8))
            number = random.choice(
                (0, 1, 2, (1 << 8 * width) - 1, 1 << (8 * width - 1), random.getrandbits(8 * width))
            )
            changed[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
        else:
            changed[at:at] = random.choice(JSON_TOKENS)[:200]
    return bytes(changed)
