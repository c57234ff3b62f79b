"""Imports training once, then forks a fresh process for every run asked for on standard input.

Request, one JSON line: ``{"config": {...}, "processes": 1, "kill_after": null}``. Answer, one JSON line: the list
of exit codes, negative for the signal that killed a process. Run as a script.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from diffusers.models.transformers import cogvideox_transformer_3d
from diffusers.schedulers import scheduling_ddim_cogvideox, scheduling_dpm_cogvideox

from cogcache.config import TrainConfig
from cogcache.errors import CogcacheError
from cogcache.train import stage, validation
from cogcache.train.model import add_lora

# Imported once, for the children.
_ = Accelerator, DistributedDataParallelKwargs, DistributedType
_ = scheduling_ddim_cogvideox, scheduling_dpm_cogvideox


def warm_up() -> None:
    """What costs time on first use only: PEFT's look at all classes."""
    model = cogvideox_transformer_3d.CogVideoXTransformer3DModel(num_layers=1, num_attention_heads=1)
    add_lora(model, TrainConfig(shards=Path("none"), rank=1))


def trace_sampling(path: str) -> None:
    """Note every video that is sampled, in a file that all processes share."""
    sample = validation.sample_latents

    def traced(*args: Any, **options: Any) -> torch.Tensor:
        with open(path, "a") as stream:
            stream.write(f"{os.environ.get('RANK', 0)} {options['generator'].initial_seed()}\n")
        return sample(*args, **options)

    validation.sample_latents = traced


def child(config: dict[str, object], environment: dict[str, str], trace: str | None) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # the answers' pipe is no place for what libraries print
    if trace:
        trace_sampling(trace)
    code = 70
    try:
        stage.train(TrainConfig(**config))
        code = 0
    except CogcacheError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start(config: dict[str, object], processes: int, trace: str | None, more: dict[str, str]) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pids = []
    for rank in range(processes):
        environment = {}
        if processes > 1:
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true",
                "GLOO_SOCKET_IFNAME": "lo",
            }
        pid = os.fork()
        if pid == 0:
            child(config, {**environment, **more}, trace)
        pids.append(pid)
    return pids


def finish(pids: list[int], kill_after: float | None) -> list[int]:
    if kill_after is not None:
        handle = os.pidfd_open(pids[0])
        ready, _, _ = select.select([handle], [], [], kill_after)
        os.close(handle)
        if not ready:
            os.kill(pids[0], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> None:
    torch.set_num_threads(1)
    warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        pids = start(request["config"], request["processes"], request["trace"], request["environment"])
        codes = finish(pids, request["kill_after"])
        answer = {"codes": codes, "seconds": time.perf_counter() - started}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
