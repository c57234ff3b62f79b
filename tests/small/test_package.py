"""The weights travel with the package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from small_kit import recipe

from cogcache.small import KINDS
from cogcache.small.shipped import MODEL_CARD, SHARED, WEIGHTS

ROOT = Path(__file__).parent.parent.parent


def test_the_weights_are_small_and_whole() -> None:
    """The package's own: what ``ship.py`` checks as it writes them."""
    found = {
        path.relative_to(WEIGHTS).as_posix(): path.read_bytes()
        for path in WEIGHTS.rglob("*")
        if path.is_file()
    }
    recipe("ship").check(found)
    assert {f"{kind}/transformer/diffusion_pytorch_model.safetensors" for kind in KINDS} <= found.keys()


def test_the_wheel_takes_the_weights() -> None:
    """It takes all of the folder ``cogcache`` that git does not ignore."""
    assert 'packages = ["cogcache"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert WEIGHTS.is_relative_to(ROOT / "cogcache")
    names = [WEIGHTS / part / "x.safetensors" for part in (*SHARED, "t2v/transformer")]
    names += [
        WEIGHTS / MODEL_CARD,
        WEIGHTS / "tokenizer" / "spiece.model",
        WEIGHTS / "t2v" / "model_index.json",
    ]
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert (ignored.returncode, ignored.stdout) == (1, "")
