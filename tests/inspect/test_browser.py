"""The gallery in a real browser: what a user sees and does."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from browser import KEYS, Browser
from inspect_kit import EVIL

from cogcache.inspect import inspect_shards
from cogcache.inspect.gallery import gallery

COUNT = "document.getElementById('count').textContent"
CARDS = "document.querySelectorAll('.card').length"
SOURCES = (
    "[...document.querySelectorAll('.card')].sort((a, b) => a.dataset.place - b.dataset.place)"
    ".map((card) => card.querySelector('.source').textContent)"
)
TOPS = "[...document.querySelectorAll('.card')].map((card) => card.getBoundingClientRect().top)"
PLACE = "Number(document.activeElement.dataset.place ?? -1)"


@pytest.fixture(scope="module")
def page(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gallery") / "gallery.html"
    inspect_shards(shards, html=out)
    return out


def search(browser: Browser, text: str) -> None:
    browser.run("(document.getElementById('search').value = '', document.activeElement.blur(), 1)")
    browser.type("/" + text)
    browser.wait(f"document.getElementById('search').value === {json.dumps(text)}")


def select(browser: Browser, name: str, value: str) -> None:
    """Choose in a list, as a user does."""
    found = f"document.getElementById({json.dumps(name)})"
    browser.run(f"({found}.value = arguments[0], {found}.dispatchEvent(new Event('change')), 1)", value)


def test_what_a_user_does(browser: Browser, page: Path) -> None:
    browser.go(page)
    assert browser.run(COUNT) == "11 of 11"
    assert browser.run("document.title") == "shards - cogcache"
    assert (
        browser.run(
            "[...document.querySelectorAll('.card img')].filter((i) => i.complete && i.naturalHeight > 9).length"
        )
        == 8
    )
    search(browser, "häschen")
    browser.wait(f"{COUNT} === '1 of 11'")
    assert browser.run(SOURCES) == ["clips/2.mp4"]
    search(browser, "too short")
    browser.wait(f"{COUNT} === '2 of 11'")
    search(browser, "no such thing")
    browser.wait("!document.getElementById('none').hidden")
    browser.go(page)
    browser.click("[data-flag='duplicate caption']")
    assert browser.run(SOURCES) == ["clips/0.mp4", "clips/1.mp4"]
    browser.click("[data-flag='duplicate caption']")
    select(browser, "bucket", "9 x 48x32 @ 8 fps")
    assert browser.run(SOURCES) == ["clips/2.mp4"]
    select(browser, "bucket", "")
    select(browser, "sort", "score")
    assert browser.run(SOURCES)[0] == "clips/6.mp4"
    assert browser.messages() == []


def test_hostile_captions_are_text(browser: Browser, page: Path) -> None:
    browser.go(page)
    assert browser.run("document.scripts.length") == 2
    captions = browser.run("[...document.querySelectorAll('.caption')].map((node) => node.textContent)")
    assert captions.count(EVIL) == 2  # a caption and a reason
    assert browser.run("document.title") == "shards - cogcache"
    assert browser.run("document.getElementById('model').textContent") == "some/<b>model"


def test_the_policy_holds(browser: Browser, page: Path) -> None:
    """Even a script that got in could not reach out."""
    browser.go(page)
    browser.run(
        "(window.refused = [], "
        "document.addEventListener('securitypolicyviolation', (e) => refused.push(e.effectiveDirective)), "
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x.png'})), "
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'})), "
        "document.body.append(Object.assign(document.createElement('iframe'), {src: 'http://127.0.0.1:9/'})), "
        "fetch('http://127.0.0.1:9/').catch(() => 0), 1)"
    )
    browser.wait("refused.length >= 4")
    assert {"img-src", "script-src-elem", "connect-src", "frame-src"} <= set(browser.run("refused"))
    assert browser.run("window.ran") is None
    browser.messages()


def test_keys_are_enough(browser: Browser, page: Path) -> None:
    browser.go(page)
    search(browser, "clips")
    browser.wait(f"{COUNT} === '8 of 11'")
    for _ in range(12):
        if browser.run(PLACE) == 0:
            break
        browser.type(KEYS["tab"])
    assert browser.run(PLACE) == 0
    browser.type(KEYS["right"])
    assert browser.run(PLACE) == 1
    browser.type(KEYS["end"])
    assert browser.run(PLACE) == 7
    browser.type(KEYS["enter"])
    assert browser.run("document.getElementById('detail').open")
    assert browser.run("document.getElementById('detail-title').textContent") == "clips/7.mp4"
    browser.type(KEYS["escape"])
    browser.wait("!document.getElementById('detail').open")
    assert browser.run(PLACE) == 7


def test_light_and_dark(browser: Browser, page: Path) -> None:
    seen = []
    for dark in (False, True):
        browser.dark(dark)
        browser.go(page)
        seen.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    browser.dark(False)
    light, night = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in seen)
    assert light > 600
    assert night < 150


def test_ten_thousand_clips_cost_a_screenful(browser: Browser, page: Path, tmp_path: Path) -> None:
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.S)[1])
    draw = random.Random(0)
    some = data["samples"]
    data["samples"] = [
        {**draw.choice(some), "id": f"{n:016x}", "source": f"many/{n:05d}.mp4"} for n in range(10_000)
    ]
    big = tmp_path / "big.html"
    big.write_text(gallery(data), "utf-8")
    browser.go(big)
    assert browser.run(COUNT) == "10,003 of 10,003"
    assert browser.run(CARDS) < 60
    browser.run("(scrollTo(0, document.body.scrollHeight / 2), 1)")
    browser.wait("[...document.querySelectorAll('.card')].some((card) => card.dataset.place > 4900)")
    assert browser.run(CARDS) < 60
    assert browser.run(f"{TOPS}.some((top) => top > 0 && top < innerHeight - 100)")
    search(browser, "many/09999")
    browser.wait(f"{COUNT} === '1 of 10,003'")
    browser.wait(f"{SOURCES}.join() === 'many/09999.mp4'")  # cards are drawn a frame later
    assert browser.messages() == []
