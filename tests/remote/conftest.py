"""Servers for every protocol, and caches behind them."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from addresses import google, hugging_face
from hub import WRITER
from making_caches import SMALL, write_cache
from servers import (
    KEY,
    SECRET,
    Bucket,
    Place,
    Server,
    gs_server,
    hf_server,
    http_server,
    post,
    program,
    s3_server,
    self_signed,
)

from cogcache.cli import run
from cogcache.tiny import Family


@pytest.fixture(scope="session")
def cache(tiny_models: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of six clips. Read only."""
    return write_cache(tmp_path_factory.mktemp("source") / "cache", tiny_models("2b"), [SMALL] * 6)


@pytest.fixture(scope="session")
def zarr_cache(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same entries in zarr arrays. Read only."""
    root = tmp_path_factory.mktemp("zarr") / "cache"
    assert run(["export", str(cache), str(root), "--format", "zarr"]) == 0
    return root


@pytest.fixture(scope="session")
def s3_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """One S3 server for all tests, and the folder of its buckets."""
    root = tmp_path_factory.mktemp("s3")
    (root / "buckets").mkdir()
    server = s3_server(root / "buckets", root / "log")
    yield server, root / "buckets"
    server.kill()


@pytest.fixture
def s3(s3_service: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A bucket of its own for each test, credentials in the environment, an empty local cache."""
    server, root = s3_service
    bucket = root / f"bucket-{len(list(root.iterdir()))}"
    bucket.mkdir()
    server.restart()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return Place(server, bucket, f"s3://{bucket.name}")


@pytest.fixture(scope="session")
def gs_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """One emulator of Google's storage for all tests, and the folder of its buckets."""
    root = tmp_path_factory.mktemp("gs")
    server = gs_server(root, root / "log")
    yield server, root / ".cloudstorage"
    server.kill()


@pytest.fixture
def gs(gs_service: tuple[Server, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of its own for each test, no credentials, an empty local cache."""
    server, root = gs_service
    server.start()
    name = f"bucket-{len(list(root.glob('*')))}"
    post(f"http://127.0.0.1:{server.port}/storage/v1/b", f'{{"name": "{name}"}}'.encode())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    google(monkeypatch, f"http://127.0.0.1:{server.port}")
    return Bucket(server, root / name, f"gs://{name}")


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A data set on a hub of its own, and a token to write to it."""
    folder = tmp_path / "hub" / "datasets" / "user" / "repo" / "main"
    folder.mkdir(parents=True)
    server = hf_server(tmp_path / "hub", tmp_path / "hub.log")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    hugging_face(monkeypatch, f"http://127.0.0.1:{server.port}")
    yield Place(server, folder, "hf://datasets/user/repo")
    huggingface_hub.close_session()
    server.kill()


@pytest.fixture
def nginx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """nginx over an empty folder."""
    yield from web_server(tmp_path, monkeypatch)


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The same by HTTPS, with a certificate that nobody trusts: ``tmp_path / "certificate.pem"``."""
    yield from web_server(tmp_path, monkeypatch, self_signed(tmp_path / "certificate.pem"))


@pytest.fixture
def https(tls: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same, trusted, as ``SSL_CERT_FILE`` makes it, which aiohttp reads when it is imported."""
    trusting = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
    return tls


def web_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, certificate: Path | None = None
) -> Iterator[Place]:
    binary = program("nginx")
    if binary is None:
        pytest.skip("nginx is not there: 'scripts/setup dev' fetches it where apt-get works")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache-home"))
    (folder / "www").mkdir()
    server = http_server(binary, folder / "www", folder / "nginx", certificate)
    yield Place(server, folder / "www", f"http{'s' if certificate else ''}://127.0.0.1:{server.port}")
    server.kill()
