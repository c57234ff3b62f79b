"""Real servers on loopback, that can be killed and brought back."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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


def s3_server(root: Path, log: Path) -> Server:
    """An S3 server whose buckets are the folders in ``root``."""
    port, rclone = free_port(), program("rclone")
    assert rclone, "rclone comes with 'scripts/setup dev'"
    command = [rclone, "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{port}"]
    return Server(
        [*command, "--auth-key", f"{KEY},{SECRET}", "--force-path-style=true", str(root)], port, log
    )


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
    listen 127.0.0.1:{port};
    location / {{ root {root}; }}
    location /whole/ {{ alias {root}/; max_ranges 0; }}
    location /locked/ {{ return 403; }}
    location /login/ {{ return 401; }}
    location /broken/ {{ return 503; }}
  }}
}}
"""


def http_server(nginx: str, root: Path, folder: Path) -> Server:
    """nginx over ``root``. /whole/ is the same without ranges; /locked/, /login/ and /broken/ refuse."""
    port = free_port()
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=folder, root=root, port=port))
    return Server(
        [nginx, "-c", str(config), "-p", str(folder), "-e", str(folder / "start.log")], port, folder / "log"
    )


def requests(folder: Path) -> list[str]:
    """What nginx was asked for: one line each."""
    log = folder / "access.log"
    return log.read_text().splitlines() if log.exists() else []
