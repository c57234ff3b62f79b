"""Real servers on loopback, that can be killed and brought back."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from urllib.request import Request, urlopen

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

KEY, SECRET = "tester", "not-a-secret"
TOOLS = Path(sys.prefix) / "tools"
"""Where ``scripts/setup dev`` unpacks nginx if the machine has none."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str | None:
    """A program of this environment, of the machine, or unpacked by the set-up."""
    places = [Path(sys.executable).parent / name, TOOLS / "usr" / "sbin" / name, Path("/usr/sbin") / name]
    return next((str(path) for path in places if path.exists()), None) or shutil.which(name)


class Server:
    """A process that listens on ``port``; killed at the end, and whenever a test wants it."""

    def __init__(self, command: list[str], port: int, log: Path) -> None:
        self.port, self._command, self._log = port, command, log
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, unless it runs, and wait until it takes connections."""
        if self._process and self._process.poll() is None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        for _ in range(1000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.01)
        raise AssertionError(f"{self._command[0]} does not listen: {self._log.read_text()}")

    def restart(self) -> None:
        """The S3 server remembers what is in a folder: it must not have run when files were changed behind its back."""
        self.kill()
        self.start()

    def kill(self) -> None:
        """SIGKILL, as a crash or the kernel would."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass
class Place:
    """A server, the folder it serves, and the URL of that folder."""

    server: Server
    folder: Path
    url: str

    def publish(self, cache: Path, name: str = "clips") -> str:
        """Let the server have a copy of ``cache``; its URL."""
        shutil.copytree(cache, self.folder / name)
        self.server.restart()
        return f"{self.url}/{name}"


class Bucket(Place):
    """One of Google's kind: what lies in its folder is only seen if it was uploaded."""

    def publish(self, cache: Path, name: str = "clips") -> str:
        """As :meth:`Place.publish`."""
        address = f"http://127.0.0.1:{self.server.port}/upload/storage/v1/b/{self.folder.name}/o"
        for path in (path for path in cache.rglob("*") if path.is_file()):
            about = json.dumps({"name": f"{name}/{path.relative_to(cache).as_posix()}"}).encode()
            parts = b"--part\r\nContent-Type: application/json\r\n\r\n%b\r\n--part\r\n\r\n%b\r\n--part--\r\n"
            kind = "multipart/related; boundary=part"
            post(f"{address}?uploadType=multipart", parts % (about, path.read_bytes()), kind)
        return f"{self.url}/{name}"


def post(url: str, data: bytes, kind: str = "application/json") -> None:
    with urlopen(Request(url, data, {"Content-Type": kind}), timeout=60):
        pass


def s3_server(root: Path, log: Path) -> Server:
    """An S3 server whose buckets are the folders in ``root``."""
    port, rclone = free_port(), program("rclone")
    assert rclone, "rclone comes with 'scripts/setup dev'"
    command = [rclone, "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{port}"]
    return Server(
        [*command, "--auth-key", f"{KEY},{SECRET}", "--force-path-style=true", str(root)], port, log
    )


def gs_server(root: Path, log: Path) -> Server:
    """Google's storage, as ``gcp-storage-emulator`` has it; buckets are folders of ``root/.cloudstorage``.

    The JSON interface, but not all that the real one does: it knows no credentials (all may do everything), no gRPC, no
    limits on how often one object is written, and answers one request at a time. Refusals are tested against
    :func:`refusing`.
    """
    port, emulator = free_port(), program("gcp-storage-emulator")
    assert emulator, "gcp-storage-emulator comes with 'scripts/setup dev'"
    command = [emulator, "-d", str(root), "start", "-H", "127.0.0.1", "--port", str(port), "--quiet"]
    return Server(command, port, log)


def hf_server(root: Path, log: Path) -> Server:
    """The hub of ``hub.py``, over the repositories in ``root``."""
    port = free_port()
    return Server([sys.executable, str(Path(__file__).with_name("hub.py")), str(port), str(root)], port, log)


@contextmanager
def refusing(status: int, body: str) -> Iterator[tuple[str, list[str]]]:
    """A server with one answer to everything: its address, and the paths it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


_NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port}{ssl};
    location / {{ root {root}; }}
    location /whole/ {{ alias {root}/; max_ranges 0; }}
    location /locked/ {{ return 403; }}
    location /login/ {{ return 401; }}
    location /broken/ {{ return 503; }}
  }}
}}
"""


def http_server(nginx: str, root: Path, folder: Path, certificate: Path | None = None) -> Server:
    """nginx over ``root``. /whole/ is the same without ranges; /locked/, /login/ and /broken/ refuse.

    Args:
        certificate: A file with a certificate and its key: it is HTTPS with them.
    """
    port = free_port()
    folder.mkdir()
    config = folder / "nginx.conf"
    ssl = f" ssl; ssl_certificate {certificate}; ssl_certificate_key {certificate}" if certificate else ""
    config.write_text(_NGINX.format(folder=folder, root=root, port=port, ssl=ssl))
    return Server(
        [nginx, "-c", str(config), "-p", str(folder), "-e", str(folder / "start.log")], port, folder / "log"
    )


def requests(folder: Path) -> list[str]:
    """What nginx was asked for: one line each."""
    log = folder / "access.log"
    return log.read_text().splitlines() if log.exists() else []


def self_signed(path: Path, host: str = "127.0.0.1") -> Path:
    """A certificate for ``host`` that vouches for itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    path.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, *form))
    return path
