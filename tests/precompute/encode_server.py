"""Imports encoding once, then forks a fresh process for every run asked for on standard input.

Request, one JSON line: ``{"configs": [{...}], "log": path, "signal": 9, "after_s": null, "after_lines": null,
"file_limit": null}``: one process for each config, all at once, all writing standard error to ``log``. With
``after_s`` all get ``signal`` after that many seconds, counted from the moment when the indexes of the cache have
grown by ``after_lines`` lines; ``file_limit`` is the largest file in bytes that they may write.
Answer, one JSON line: the list of exit codes, negative for the signal that
killed a process. Run as a script.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_cogvideox
from transformers.models.t5 import modeling_t5, tokenization_t5

from cogcache import cli, video
from cogcache.precompute import encode

# Imported once, for the children.
_ = autoencoder_kl_cogvideox, modeling_t5, tokenization_t5, encode, video


def child(config: dict[str, Any], log: str, file_limit: int | None) -> None:
    code = 70
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in config.items()]
        cli.main(["encode", *flags])
    except SystemExit as done:
        code = int(done.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def start(config: dict[str, Any], log: str, file_limit: int | None) -> int:
    pid = os.fork()
    if pid == 0:
        child(config, log, file_limit)
    return pid


def lines(shards: Path) -> int:
    """Lines in all indexes of a cache, those of unfinished shards too."""
    total = 0
    for index in shards.glob("*/*.index.*"):
        with contextlib.suppress(OSError):  # renamed or removed just now
            total += index.read_bytes().count(b"\n")
    return total


def finish(pids: list[int], request: dict[str, Any]) -> list[int]:
    shards = Path(request["configs"][0]["shards"])
    after_s, after_lines = request["after_s"], request["after_lines"]
    target = None if after_lines is None else lines(shards) + after_lines
    end = time.monotonic() + after_s if after_s is not None and target is None else float("inf")
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if target is not None and lines(shards) >= target:
            target, end = None, time.monotonic() + after_s
        if time.monotonic() >= end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, request["signal"])
            end = float("inf")
        time.sleep(0.001)
    return [codes[pid] for pid in pids]


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # for the children; it may come ignored
        started = time.monotonic()
        pids = [start(config, request["log"], request["file_limit"]) for config in request["configs"]]
        codes = finish(pids, request)
        sys.stdout.write(json.dumps({"codes": codes, "seconds": time.monotonic() - started}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
