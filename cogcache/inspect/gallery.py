"""The gallery: one HTML file that needs nothing else and may load nothing else.

The template beside this module holds three marks. Data goes in as JSON inside a script element that is never run, with
every character escaped that could end it; the page makes text nodes of it, never markup. The policy in its head allows
the page's own script and style by their hashes, pictures from data URIs, and nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["allowed", "escaped_json", "gallery"]

_FOLDER = Path(__file__).parent


def gallery(report: Mapping[str, Any]) -> str:
    """The page for what :func:`~cogcache.inspect.gather.gather` found."""
    parts = {name: (_FOLDER / f"gallery.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    policy = (
        f"default-src 'none'; img-src data:; style-src {allowed(parts['css'])}; "
        f"script-src {allowed(parts['js'])}; base-uri 'none'; form-action 'none'"
    )
    head, middle, after = parts["html"].split("{{cut}}")
    return (
        f'{head}<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{parts["css"]}</style>{middle}'
        f'<script type="application/json" id="data">{escaped_json(report)}</script>\n'
        f"<script>{parts['js']}</script>{after}"
    )


def allowed(content: str) -> str:
    """What a content security policy says to allow this style or script, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode('ascii')}'"


def escaped_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor open another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)
