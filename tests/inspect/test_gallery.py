"""The gallery as text: whole, alone, and closed to what captions try."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspect_kit import CAPTIONS, EVIL
from making_videos import picture, write_video
from PIL import Image

from cogcache.inspect import inspect_shards
from cogcache.inspect.gallery import escaped_json
from cogcache.inspect.pictures import false_colours, find_video


class Page(HTMLParser):
    """Every element with its attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(("/" + tag, {}, ""))

    def handle_data(self, data: str) -> None:
        if self.found:
            tag, attrs, text = self.found[-1]
            self.found[-1] = tag, attrs, text + data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, text) for name, attrs, text in self.found if name == tag]


@pytest.fixture(scope="module")
def text(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("gallery") / "deep" / "gallery.html"
    inspect_shards(shards, html=out)
    return out.read_text("utf-8")


def data_of(page: Page) -> Any:
    (found,) = [text for attrs, text in page.all("script") if attrs.get("id") == "data"]
    return json.loads(found)


def test_the_data_is_whole(text: str) -> None:
    data = data_of(Page(text))
    assert [clip["caption"] for clip in data["samples"]] == CAPTIONS
    assert [row["reason"] for row in data["failures"]] == ["too short", "too short", EVIL]
    for clip in data["samples"]:
        kind, code = clip["picture"].split(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(code))).height <= 72


def test_captions_make_no_elements(text: str) -> None:
    page = Page(text)
    assert len(page.all("script")) == 2
    assert [attrs.get("id") for attrs, _ in page.all("img")] == ["detail-picture"]
    assert "onerror" not in str([attrs for _, attrs, _ in page.found])
    assert "innerHTML" not in text
    assert "document.write" not in text


def test_it_needs_and_may_load_nothing(text: str) -> None:
    page = Page(text)
    assert not [attrs for _, attrs, _ in page.found if {"src", "href", "action", "style"} & attrs.keys()]
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket", text)
    (policy,) = [
        a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (script,) = [text for attrs, text in page.all("script") if "id" not in attrs]
    (style,) = [text for _, text in page.all("style")]
    for name, content in (("script-src", script), ("style-src", style)):
        known = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{known}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    first_meta = [a for a, _ in page.all("meta")][:2]
    assert first_meta[0] == {"charset": "utf-8"}
    assert first_meta[1]["content"] == policy, "the policy comes before anything that it rules"


@given(st.text() | st.sampled_from(["<!--", "<SCRIPT", "</sCript >", "]]>", "\ud800", "\u2028", "&lt;"]))
def test_any_text_survives_the_script_element(text: str) -> None:
    code = escaped_json({"a": text})
    assert not set("<>&\u2028\u2029") & set(code)
    code.encode()
    assert json.loads(code) == {"a": text}


def test_pictures_come_from_the_video_where_it_is_there(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "0.mp4", frames=9, image=picture)
    (tmp_path / "clips" / "1.mp4").write_bytes(b"not a video")
    out = tmp_path / "gallery.html"
    inspect_shards(shards, html=out, data_root=tmp_path)
    samples = data_of(Page(out.read_text("utf-8")))["samples"]

    def shape(clip: Any) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(clip["picture"].split(",")[1]))).size

    assert shape(samples[0]) == (3 * 120, 72)  # 160x96
    assert shape(samples[1]) == (3 * 108, 72)  # the latent's 48x32
    assert shape(samples[2]) == (3 * 48, 72)


def test_no_video_outside_the_data_root_is_read(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (tmp_path / "root" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "root" / "good.mp4").write_bytes(b"x")
    for name in ("../secret.mp4", str(tmp_path / "secret.mp4"), "link.mp4", "missing.mp4", "a\0b"):
        assert find_video(tmp_path / "root", name) is None
    assert find_video(tmp_path / "root", "good.mp4") == (tmp_path / "root" / "good.mp4").resolve()
    assert find_video(None, "good.mp4") is None


def test_false_colours_show_structure_and_stand_anything() -> None:
    mean = np.random.default_rng(0).normal(size=(16, 3, 8, 12)).astype(np.float32) * 0.1
    mean[5, :, :, 6:] += 4  # the strongest component: right half against left half
    first = false_colours(mean)[0].astype(int)
    left, right = first[:, : first.shape[1] // 3, 1].mean(), first[:, -first.shape[1] // 3 :, 1].mean()
    assert abs(left - right) > 150
    mean[0, 0, 0, 0] = np.nan
    assert false_colours(mean)[0].dtype == np.uint8
    assert false_colours(np.zeros((16, 1, 2, 2), np.float32))[2].shape == (72, 72, 3)
    assert len(false_colours(np.ones((2, 1, 2, 2), np.float32))) == 3
