"""``cogcache encode --shards URL`` itself: from videos to a server, and what other commands then find there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from making_videos import picture, write_video
from servers import Place

from cogcache.cache.backend import BACKENDS
from cogcache.cache.format import LATENTS, TEXT
from cogcache.cache.reader import CacheReader
from cogcache.cache.remote.connection import Connection
from cogcache.cli import run
from cogcache.tiny import Family

CLIPS = 3
THIS_RUN = ("encode.config.yaml", "journal.jsonl", ".lock")
"""Files that name places and times."""


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 9 frames with captions. Read only."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(CLIPS):
        write_video(root / f"{number}.mp4", frames=9, image=lambda n, offset=number: picture(n + 9 * offset))
        (root / f"{number}.txt").write_text(f"clip {number}", "utf-8")
    return root


@pytest.fixture
def encode(videos: Path, tiny_models: Callable[[Family], Path], tmp_path: Path) -> Callable[..., int]:
    """The command: exit code of encoding to these shards."""
    data = Path(shutil.copytree(videos, tmp_path / "data"))

    def command(shards: object, *more: str) -> int:
        given = ["--data-root", str(data), "--model", str(tiny_models("5b")), "--shards", str(shards)]
        return run(["encode", *given, "--frames=9", "--size=16x32", "--fps=source", "--device=cpu", *more])

    return command


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and path.name not in THIS_RUN)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of all files that are uploaded from now on."""
    names: list[str] = []
    upload = Connection.upload

    def noted(self: Connection, source: Path | bytes, name: str) -> None:
        names.append(name)
        upload(self, source, name)

    monkeypatch.setattr(Connection, "upload", noted)
    return names


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        *(("s3", kind) for kind in BACKENDS),
        ("gs", "webdataset"),
        pytest.param("hf", "webdataset", marks=pytest.mark.slow),
    ],
)
def test_encoding_to_a_url_equals_encoding_to_a_folder(
    server: str,
    kind: str,
    request: pytest.FixtureRequest,
    encode: Callable[..., int],
    sent: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place: Place = request.getfixturevalue(server)
    url = f"{place.url}/clips"
    to_url = [url, "--format", kind, "--staging", str(tmp_path / "staging")]
    assert encode(tmp_path / "folder", "--format", kind) == 0
    capsys.readouterr()
    assert encode(*to_url) == 0
    assert f"{url}: 3 clips ready, 0 failed. Encoded now: 3 latents, 4 captions." in capsys.readouterr().err
    assert files(place.folder / "clips") == files(tmp_path / "folder")
    assert run(["verify", url]) == 0
    capsys.readouterr()
    assert run(["inspect", url, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == CLIPS

    sent.clear()
    (tmp_path / "data" / "1.txt").write_text("another caption", "utf-8")
    shutil.rmtree(tmp_path / "staging")  # as on another machine, which would make shards of another size
    assert encode(*to_url, "--shard-size", "0.001") == 0
    assert "Encoded now: 0 latents, 1 caption." in capsys.readouterr().err
    assert not [name for name in sent if name.startswith(f"{LATENTS}/") and not name.endswith("zarr.json")]
    assert "another caption" in [sample.caption for sample in CacheReader(url).samples]
    assert encode(tmp_path / "folder") == 0
    assert files(place.folder / "clips") == files(tmp_path / "folder")
    assert run(["verify", url]) == 0
    sent.clear()
    assert encode(*to_url) == 0
    assert not [name for name in sent if name.startswith((LATENTS, TEXT))]
    for array in (place.folder / "clips").glob("*/*/zarr.json"):
        array.unlink()
    place.server.restart()
    assert encode(*to_url) == 0
    assert files(place.folder / "clips") == files(tmp_path / "folder")
