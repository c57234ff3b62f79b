"""Archives of public packages: fetched by the package managers as they are configured, checked, and read."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cogcache.errors import StorageError
from cogcache.hashing import file_sha256

_PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
COMMANDS = {
    "pip-wheel": [*_PIP, "--only-binary=:all:", "--python-version=3.10", "--platform=manylinux2014_x86_64"],
    "pip-sdist": [*_PIP, "--no-binary=:all:", "--no-build-isolation"],
    "apt": ["apt-get", "download", "--quiet"],
    "apt-source": ["source", "--download-only", "--tar-only"],
}
"""What fetches an archive into the current folder; the package, with its version, comes last."""


def fetch(way: str, package: str, archive: Path, sha256: str) -> None:
    """Have an archive of the given sha256; one that is there is not fetched again.

    Raises:
        StorageError: if it cannot be fetched, or is another one.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        print(f"fetching {package}", flush=True)
        try:
            before = _own_apt(archive.parent) if way == "apt-source" else []
            subprocess.run([*before, *COMMANDS[way], package], cwd=archive.parent, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise StorageError(f"{package} cannot be fetched: {error}.", hint=_by_hand(archive)) from None
    if not archive.exists():
        raise StorageError(f"{package} has no {archive.name}.", hint=_by_hand(archive))
    if file_sha256(archive) != sha256:
        raise StorageError(
            f"{archive} is another file than was listed.", hint=f"Its sha256 must be {sha256}."
        )


def extract(archive: Path, folder: str, files: Sequence[Path]) -> None:
    """Write the members of a folder in an archive, each to the file of the same name."""
    wanted = {f"{folder}/{file.name}": file for file in files if not file.exists()}
    for name, data in _members(archive, set(wanted)) if wanted else ():
        wanted[name].parent.mkdir(parents=True, exist_ok=True)
        wanted[name].write_bytes(data)
    missing = [name for name, file in wanted.items() if not file.exists()]
    if missing:
        raise StorageError(f"{archive} has no {', '.join(missing)}.")


def _members(archive: Path, names: set[str]) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in names & set(wheel.namelist()))
        return
    if archive.suffix == ".deb":
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True)
        stream: Any = io.BytesIO(unpacked.stdout)
    else:
        stream = archive.open("rb")
    with stream, tarfile.open(fileobj=stream) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if name in names and (content := tar.extractfile(member)):
                yield name, content.read()


def _own_apt(folder: Path) -> list[str]:
    """The start of an apt command that knows source packages, with lists and cache of its own, brought up to date."""
    own = (folder / "apt").resolve()
    for part in ("parts", "lists/partial", "cache/archives/partial"):
        (own / part).mkdir(parents=True, exist_ok=True)
    configured = Path("/etc/apt")
    for file in [configured / "sources.list", *(configured / "sources.list.d").glob("*")]:
        if file.suffix in (".list", ".sources") and file.is_file():
            (own / "parts" / file.name).write_text(as_source(file.read_text("utf-8")), "utf-8")
    places = {"Etc::SourceList": "/dev/null", "Etc::SourceParts": own / "parts",
              "State::Lists": own / "lists", "Cache": own / "cache"}  # fmt: skip
    apt = ["apt-get", "--quiet", *(f"-oDir::{name}={place}" for name, place in places.items())]
    subprocess.run([*apt, "update"], check=True)
    return apt


def as_source(text: str) -> str:
    """A list of apt's, in either of its formats, that speaks of source packages instead."""
    return re.sub(
        r"^deb(?=[ \t])", "deb-src", re.sub(r"^Types:.*", "Types: deb-src", text, flags=re.M), flags=re.M
    )


def _by_hand(archive: Path) -> str:
    return f"Put {archive.name} into {archive.parent} by other means, and run this again."
