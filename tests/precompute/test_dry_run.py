"""encode --dry-run tells what would be done and why, and does nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from making_videos import picture, write_video

from cogcache.config import EncodeConfig
from cogcache.errors import MismatchError
from cogcache.precompute import encode, encode_all
from cogcache.precompute.dry_run import plan_run
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae


@pytest.fixture
def data(clips_root: Path, tmp_path: Path) -> Path:
    """Four clips, the fourth unreadable."""
    root = tmp_path / "data"
    root.mkdir()
    for name in ("0.mp4", "0.txt", "1.mp4", "1.txt", "2.mp4", "2.txt", "3.txt"):
        shutil.copy(clips_root / name, root)
    (root / "3.mp4").write_bytes(b"not a video" * 100)
    return root


@pytest.fixture
def config(settings: Callable[..., EncodeConfig], data: Path) -> Callable[..., EncodeConfig]:
    def make(**changes: object) -> EncodeConfig:
        return settings(**{"data_root": data, "size": "16x32", **changes})

    return make


def state(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file, and time of every folder."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in [root, *root.rglob("*")]
    }


def test_plan_is_what_is_then_done(
    config: Callable[..., EncodeConfig],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = plan_run(config())
    assert [change.why for change in plan.changes] == ["new"] * 4
    assert plan.entries == {"latents": 4, "text": 5, "images": 0}
    shards = config().shards
    assert shards
    assert not shards.exists()
    done = encode_all(config())
    assert (done.encoded, done.captions) == (3, 5)

    (data / "0.txt").write_text("another caption")
    write_video(data / "1.mp4", frames=30, image=lambda n: picture(n + 77))
    shutil.copy(data / "2.mp4", data / "4.mp4")
    (data / "4.txt").write_text("another caption")
    (data / "2.mp4").unlink()
    (data / "2.txt").unlink()
    before = state(shards)
    capsys.readouterr()
    with monkeypatch.context() as no_models:
        no_models.delattr(FrozenVae, "__init__")
        no_models.delattr(FrozenText, "__init__")
        encode(config(dry_run=True))
    told = capsys.readouterr().out.splitlines()
    assert state(shards) == before
    assert told[0].startswith("0.mp4 (start): changed caption: was 'A rabbit")
    assert told[0].endswith("is 'another caption' -> 1 caption")
    assert told[1] == "1.mp4 (start): changed file -> 1 latent"
    assert told[2].startswith("3.mp4 (start): failed before (")
    assert told[3] == "4.mp4 (start): new -> 1 caption"  # the same video and caption as others
    assert told[4].startswith("2.mp4 (start): removed")
    assert told[5] == (
        "Clips: 1 changed caption, 1 changed file, 1 failed before, 1 new, 1 removed, 0 unchanged."
    )
    assert told[6].startswith("Would encode 2 latents, 1 caption, 0 image conditions.")
    done = encode_all(config())
    assert (done.encoded, done.captions) == (1, 1)  # the other one of the two latents fails again
    assert [change.source for change in plan_run(config()).changes] == ["3.mp4"]


def test_changed_settings_are_told_and_refused(config: Callable[..., EncodeConfig]) -> None:
    encode_all(config())
    shards = config().shards
    assert shards
    before = state(shards)
    with pytest.raises(MismatchError) as error:
        encode(config(dry_run=True, size="32x48"))
    assert error.value.differences == {"buckets": ("9x16x32", "9x32x48")}
    assert state(shards) == before


def test_more_image_draws(config: Callable[..., EncodeConfig]) -> None:
    make = {"family": "5b-i2v", "size": None, "frames": None, "short": "pad", "fps": "native"}
    encode_all(config(image_draws=1, **make))
    plan = plan_run(config(image_draws=3, **make))
    whys = {change.source: change.why for change in plan.changes}
    assert whys["0.mp4"] == "image conditions: was 1, is 3"
    assert whys["3.mp4"].startswith("failed before")
    assert plan.entries["images"] == 3 * 2 + 3
