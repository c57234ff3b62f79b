"""Certificates: one that is trusted, and others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from addresses import google, hugging_face
from servers import Place, self_signed

from cogcache.cache.reader import CacheReader
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.errors import CacheError

BRIEF = RemoteOptions(patience=0.5)


def inspect(url: str, trusted: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """The command, in a process that trusts the certificates in a file."""
    environment = {**os.environ, "SSL_CERT_FILE": str(trusted), "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-m", "cogcache", "inspect", url, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_an_authority_that_the_user_names(tls: Place, cache: Path, tmp_path: Path) -> None:
    url = tls.publish(cache)
    done = inspect(url, tmp_path / "certificate.pem", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["samples"]) == 6
    done = inspect(url, self_signed(tmp_path / "another.pem"), tmp_path / "two")
    assert done.returncode == 2
    assert f"no use of {url}: " in done.stderr
    assert "SSL_CERT_FILE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("https", "SSL_CERT_FILE"),
        ("gs://bucket/clips", "SSL_CERT_FILE"),
        ("hf://datasets/user/repo/clips", "SSL_CERT_FILE"),
        ("s3://bucket/clips", "AWS_CA_BUNDLE"),
    ],
)
def test_a_certificate_that_is_not_trusted_is_told_at_once(
    url: str, variable: str, tls: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    google(monkeypatch, tls.url)
    hugging_face(monkeypatch, tls.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", tls.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tester")
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    asked = f"{tls.url}/clips" if url == "https" else url
    with pytest.raises(CacheError, match=f"no use of {asked}: .*(?i:certificate)") as caught:
        CacheReader(asked, BRIEF)
    assert variable in caught.value.hint
    log = tmp_path / "nginx" / "access.log"
    assert not log.exists() or log.read_text() == ""  # nothing was said to a server that may be another
