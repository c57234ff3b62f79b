"""How long a training takes until its first step, beside plainly reading the weights.

    python benchmarks/startup.py [WORK] [--memory small] [--gpu-memory 6]

Makes a checkpoint of CogVideoX-5B's size with random bfloat16 weights (11 GB) and a small random cache, then runs
``cogcache train --memory small --steps 4`` in processes of its own: with an empty compile cache, with the one that the
first run left, and once more without the disk's share. Before the plain read and the first two runs the files are
dropped from the page cache, where the system lets us. Prints what the runs say with the seconds since their start.
``--gpu-memory`` lets torch take no more of the GPU than so many GiB, from the beginning of each run to its end: whole
trainings of real size on a small card. Needs a GPU and 15 GB of disk; about three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

STEPS, CLIPS = 4, 4
LIMITED = (
    "import sys; from cogcache.bench.card import cap_gpu_memory; cap_gpu_memory(float(sys.argv.pop(1)));"
    "from cogcache.cli import main; main()"
)


def build(work: Path) -> Path:
    """The model folder; the weights in files of at most 4 GB."""
    import torch

    from cogcache.bench.random_cache import random_cache
    from cogcache.bench.real import real_transformer
    from cogcache.tiny import build_tiny_model

    model = build_tiny_model(work / "model", "5b", dtype="bfloat16")
    transformer, variant = real_transformer("5b", torch.bfloat16, torch.device("cuda"))
    for path in (model / "transformer").iterdir():
        path.unlink()
    transformer.save_pretrained(model / "transformer", max_shard_size="4GB")
    del transformer
    torch.cuda.empty_cache()
    random_cache(work / "shards", "5b", CLIPS, variant)
    return model


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def read_plainly(folder: Path) -> tuple[float, float]:
    """Seconds and GB/s of reading all weights one after the other."""
    buffer = bytearray(16 << 20)
    started, size = time.perf_counter(), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                size += count
    seconds = time.perf_counter() - started
    return seconds, size / seconds / 1e9


def run(work: Path, name: str, options: argparse.Namespace) -> list[tuple[float, str]]:
    """One training; what it says, with the seconds since its start."""
    program = ["-m", "cogcache"] if options.gpu_memory is None else ["-c", LIMITED, str(options.gpu_memory)]
    command = [sys.executable, *program, "train", "--memory", options.memory, "--steps", str(STEPS)]
    command += ["--shards", str(work / "shards"), "--model", str(work / "model"), "--checkpoint-every", "0"]
    command += ["--output", str(work / name), "--rank", "128"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines = [(time.perf_counter() - started, line.rstrip()) for line in process.stderr]
    lines.append((time.perf_counter() - started, f"exit code {process.wait()}"))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="?", help="folder to work in; default: one for temporary files")
    parser.add_argument("--memory", default="small", help="memory tier")
    parser.add_argument("--gpu-memory", type=float, help="GiB that torch may take of the GPU")
    options = parser.parse_args()
    with TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        started = time.perf_counter()
        weights = build(work) / "transformer"
        print(f"made the model and the cache in {time.perf_counter() - started:.0f} s", flush=True)
        for name in ("dropped from the page cache", "in the page cache"):
            if name.startswith("dropped"):
                forget(weights)
            seconds, rate = read_plainly(weights)
            print(f"reading the weights plainly, {name}: {seconds:.1f} s, {rate:.1f} GB/s", flush=True)
        for name in ("empty compile cache", "warm compile cache", "warm, weights in the page cache"):
            if "page cache" not in name:
                forget(weights)
            print(name, flush=True)
            for moment, line in run(work, name.replace(", ", " ").replace(" ", "-"), options):
                print(f"  {moment:6.1f} s  {line}", flush=True)
            metrics = work / name.replace(", ", " ").replace(" ", "-") / "metrics.jsonl"
            if metrics.exists():
                steps = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
                print("  seconds of the steps:", *(f"{value:.2f}" for value in steps), flush=True)
        size = sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file())
        print(f"the cache folder holds {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
