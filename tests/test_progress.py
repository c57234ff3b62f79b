"""A live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from cogcache import progress
from cogcache.progress import Progress, say


def test_plain_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress("clips", 100, "clips") as bar:
        for _ in range(100):
            clock[0] += 1
            bar.advance(waiting_for_files="3%", failed=0)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 5
    assert lines[0] == "clips: 31/100  1.00 clips/s  waiting for files 3%, failed 0"
    assert lines[-1].startswith("clips: 100/100  1.00 clips/s")


def test_nothing_is_said_of_work_that_never_began(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no model"), Progress("clips", 3, "clips"):
        raise ValueError("no model")
    assert capsys.readouterr().err == ""
    bar = Progress("clips", 3, "clips")
    bar.advance()
    with pytest.raises(ValueError, match="later"), bar:
        raise ValueError("later")
    assert capsys.readouterr().err.startswith("clips: 1/3")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("clips", 3, "clips") as bar:
        bar.advance(2, failed=1)
        bar.advance(note_with="[brackets]")
    shown = screen.getvalue()
    assert "3/3" in shown
    assert "clips/s" in shown
    assert "\x1b[?25h" in shown, "the cursor is shown again"


def test_say_prints_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a [bold]file[/] name: [/b].mp4 " + "long " * 100
    say(text)
    captured = capsys.readouterr()
    assert captured.err == text + "\n"
    assert captured.out == ""
