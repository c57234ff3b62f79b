"""A small Hugging Face hub: ``python hub.py PORT ROOT`` serves the repositories in a folder, for ``HF_ENDPOINT``.

``ROOT/datasets/user/repo/revision/...`` holds the files of each revision; ``main`` is the branch that commits go to.
Modelled is what ``huggingface_hub`` asks for when a cache is read and written:

- whether a repository and a revision exist; ``X-Error-Code`` where not; 401 for what a reader may not know of;
- the listing of a folder (``tree``), in pages joined by ``Link``; ``paths-info``;
- ``resolve``, which for large files redirects to another address, and there parts of files (``Range``);
- ``preupload``, the LFS batch interface with its upload, and ``commit``;
- tokens: repositories called ``private...`` want one, and so do all writes; ``hf_reader`` may not write.

Not modelled: git itself (no history, a commit changes the folder of its branch), Xet, which large files are uploaded by
unless ``HF_HUB_DISABLE_XET`` is set, buckets, limits on rates and sizes, pull requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3
"""Entries of a page of a listing; the real hub has 1000."""
READER, WRITER = "hf_reader", "hf_writer"
LARGE = (".tar", ".bin")
"""What goes by LFS."""

_API = re.compile(
    r"/api/datasets/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(/.*)?)?"
)
_FILE = re.compile(r"/datasets/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.*)")
_LFS = re.compile(r"/datasets/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch")
_OBJECT = re.compile(r"/objects/(\w+)")


class Refused(Exception):  # noqa: N818
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Hub(BaseHTTPRequestHandler):
    """One request."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def do_PUT(self) -> None:
        self._guarded(self._put)

    def _guarded(self, answer: object) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            answer()
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(b"", refused.status, {k: v for k, v in headers.items() if v})

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json", **(headers or {})})

    # Who may do what ------------------------------------------------------------------------------------------------

    def _folder(self, repo: str, revision: str, write: bool = False) -> Path:
        """The files of a revision."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        folder = self.root / "datasets" / repo
        if token and token not in (READER, WRITER):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if not token and (write or repo.split("/")[1].startswith("private") or not folder.is_dir()):
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if not folder.is_dir():
            raise Refused(404, "RepoNotFound", "Repository not found")
        if write and token == READER:
            raise Refused(403, "", "You don't have the rights to write")
        if not (folder / unquote(revision)).is_dir():
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return folder / unquote(revision)

    # Reading --------------------------------------------------------------------------------------------------------

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if match := _API.fullmatch(path):
            repo, what, revision, inside = match.groups()
            folder = self._folder(repo, revision or "main")
            if what == "tree":
                return self._tree(folder, unquote(inside or "").strip("/"))
            state = {p.as_posix(): p.stat().st_size for p in folder.rglob("*")}
            sha = hashlib.sha1(repr(sorted(state.items())).encode()).hexdigest()
            return self._json({"_id": repo, "id": repo, "sha": sha, "private": False, "tags": []})
        if match := _FILE.fullmatch(path):
            file = self._folder(match[1], match[2]) / unquote(match[3])
            if not file.is_file():
                raise Refused(404, "EntryNotFound", "Entry not found")
            if file.suffix in LARGE:
                where = f"/cdn/{file.relative_to(self.root).as_posix()}"
                return self._send(b"", 302, {"Location": f"http://{self.headers['Host']}{where}"})
            return self._bytes(file)
        if path.startswith("/cdn/"):
            return self._bytes(self.root / unquote(path.removeprefix("/cdn/")))
        raise Refused(404)

    def _bytes(self, file: Path) -> None:
        data, wanted = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self._send(data)
        start, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if start >= len(data):
            raise Refused(416)
        return self._send(data[start : last + 1], 206, {"Content-Range": f"bytes {start}-{last}/{len(data)}"})

    def _tree(self, folder: Path, inside: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("cursor", ["0"])[0])
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        top = folder / inside
        if not top.is_dir():
            raise Refused(404, "EntryNotFound", f"{inside} does not exist")
        found = [_entry(folder, path) for path in sorted(top.rglob("*") if recursive else top.iterdir())]
        headers = {}
        if start + PAGE < len(found):
            base = f"http://{self.headers['Host']}{urlsplit(self.path).path}"
            headers["Link"] = f'<{base}?recursive={recursive}&cursor={start + PAGE}>; rel="next"'
        self._json(found[start : start + PAGE], headers)

    # Writing --------------------------------------------------------------------------------------------------------

    def _post(self) -> None:
        path = urlsplit(self.path).path
        if match := _LFS.fullmatch(path):
            self._folder(match[1], "main", write=True)
            return self._batch(json.loads(self.body))
        if (match := _API.fullmatch(path)) is None:
            raise Refused(404)
        repo, what, revision, _ = match.groups()
        folder = self._folder(repo, revision, write=what in ("preupload", "commit"))
        if what == "paths-info":
            names = parse_qs(self.body.decode())["paths"]
            return self._json([_entry(folder, folder / name) for name in names if (folder / name).exists()])
        if what == "preupload":
            files = [_upload_mode(folder, file["path"]) for file in json.loads(self.body)["files"]]
            return self._json({"files": files})
        self._commit(folder, [json.loads(line) for line in self.body.splitlines()])
        url = f"http://{self.headers['Host']}/datasets/{repo}/commit/{'0' * 40}"
        return self._json({"commitUrl": url, "commitOid": "0" * 40, "success": True})

    def _batch(self, asked: dict[str, object]) -> None:
        objects = []
        for one in asked["objects"]:
            there = (self.root / "objects" / one["oid"]).exists()
            upload = {"upload": {"href": f"http://{self.headers['Host']}/objects/{one['oid']}"}}
            objects.append({**one, **({} if there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _put(self) -> None:
        match = _OBJECT.fullmatch(urlsplit(self.path).path)
        if match is None or hashlib.sha256(self.body).hexdigest() != match[1]:
            raise Refused(400, "", "not what was announced")
        _write(self.root / "objects" / match[1], self.body)
        self._send(b"")

    def _commit(self, folder: Path, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                _write(folder / value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                _write(folder / value["path"], (self.root / "objects" / value["oid"]).read_bytes())
            elif line["key"] == "deletedFile":
                if not (folder / value["path"]).is_file():
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
                (folder / value["path"]).unlink()

    def log_message(self, form: str, *values: object) -> None:
        sys.stderr.write(form % values + "\n")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.write_bytes(data)
    draft.replace(path)


def _blob(path: Path) -> str:
    """What git calls the contents of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(folder: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    found: dict[str, object] = {"type": "file", "path": name, "oid": _blob(path), "size": path.stat().st_size}
    if path.suffix in LARGE:
        oid = hashlib.sha256(path.read_bytes()).hexdigest()
        found["lfs"] = {"oid": oid, "size": path.stat().st_size, "pointerSize": 130}
    return found


def _upload_mode(folder: Path, name: str) -> dict[str, object]:
    path, large = folder / name, Path(name).suffix in LARGE
    found: dict[str, object] = {
        "path": name,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }
    if path.is_file():
        found["oid"] = hashlib.sha256(path.read_bytes()).hexdigest() if large else _blob(path)
    return found


def main() -> None:
    Hub.root = Path(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Hub).serve_forever()


if __name__ == "__main__":
    main()
