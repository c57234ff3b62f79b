"""The command line itself: light to start, right in its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cogcache import __version__, cli
from cogcache.errors import CogcacheError, NonFiniteError, PartialFailureError, StoppedError

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "av", "decord", "numpy", "PIL"}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("from cogcache.cli import run; run(['--help'])", HEAVY | {"pydantic", "yaml"}),
        ("from cogcache.cli import run; run(['train', '--help'])", HEAVY),
        ("from cogcache.cli import run; run(['train', '--stpes', '3'])", HEAVY),
        ("from cogcache.cli import run; run(['encode', '--config', 'none.yaml'])", HEAVY),
        ("from cogcache import errors, config, geometry, variants, draws, models, hashing, lora", HEAVY),
        ("import cogcache.cache.format", HEAVY),
    ],
)
def test_nothing_heavy_is_imported(code: str, unwanted: set[str]) -> None:
    report = f"{code}\nimport sys; print('LOADED', *(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert "cogcache" in loaded
    assert not loaded & unwanted


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cogcache", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"cogcache {__version__}"
    missing = subprocess.run(
        [sys.executable, "-m", "cogcache", "train", "--shards", "nowhere"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("Error: ")
    assert "Traceback" not in missing.stderr


def test_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("encode", "train", "infer", "tiny-model", "small-model", "convert-lora", "demo"):
        assert name in shown
    assert cli.run([]) in (0, 2)


def test_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["encdoe"]) == 2
    assert "Did you mean 'encode'?" in capsys.readouterr().err


def raising(error: BaseException) -> object:
    def app(**_: object) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (CogcacheError("It is wrong.", "Mend it."), 2, "Error: It is wrong."),
        (PartialFailureError("2 of 3 clips failed."), 3, "Incomplete: 2 of 3 clips failed."),
        (NonFiniteError("NaN."), 4, "Error: NaN."),
        (StoppedError("Stopped after step 3.", 2), 130, "Stopped after step 3."),
        (StoppedError("Stopped after step 3.", 15), 143, "Stopped after step 3."),
        (KeyboardInterrupt(), 130, "Stopped. What is finished stays"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    first: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "app", raising(error))
    assert cli.run([]) == code
    said = capsys.readouterr().err
    assert said.startswith(first)
    assert len(said.splitlines()) == (2 if "wrong" in first else 1)
    monkeypatch.setenv("COGCACHE_TRACEBACK", "1")
    cli.run([])
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, CogcacheError)


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raising(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        cli.run([])


def test_main_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", raising(PartialFailureError("Some failed.")))
    with pytest.raises(SystemExit) as raised:
        cli.main([])
    assert raised.value.code == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_tiny_model_refuses_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert cli.run(["tiny-model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
    assert (tmp_path / "mine.txt").read_text() == "keep me"
