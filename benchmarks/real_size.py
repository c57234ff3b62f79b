"""Run encode, train and infer at the real size of a model on one GPU, and report time and peak memory of each.

Weights are random, made from the real configs, since speed and memory do not depend on them; nothing is
downloaded but what is installed. Text width and length are those of the tiny text encoder: its share is negligible.

    python benchmarks/real_size.py 5b /tmp/real --size 480x720 --frames 49 --steps 6

Needs about 25 GB of disk in the work folder.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

CLIPS = Path(__file__).parent.parent / "cogcache" / "demo" / "bunny"


def build_model(family: Any, out: Path) -> Path:
    """A checkpoint folder of real size with random weights in the family's own precision."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    from cogcache.bench.real import real_config
    from cogcache.tiny import build_tiny_model

    name = "float16" if family == "2b" else "bfloat16"
    build_tiny_model(out, family, dtype=name)
    transformer = json.loads((out / "transformer" / "config.json").read_text())
    vae = json.loads((out / "vae" / "config.json").read_text())
    narrow = {"text_embed_dim": transformer["text_embed_dim"]}  # as wide as the tiny text encoder
    config = real_config(family, transformer) | narrow
    torch.set_default_dtype(getattr(torch, name))
    try:
        with torch.device("cuda"):
            models = {
                "transformer": CogVideoXTransformer3DModel.from_config(config),
                "vae": AutoencoderKLCogVideoX(
                    down_block_types=("CogVideoXDownBlock3D",) * 4,
                    up_block_types=("CogVideoXUpBlock3D",) * 4,
                    block_out_channels=(128, 256, 256, 512),
                    latent_channels=16,
                    layers_per_block=3,
                    scaling_factor=vae["scaling_factor"],
                    invert_scale_latents=vae["invert_scale_latents"],
                ),
            }
    finally:
        torch.set_default_dtype(torch.float32)
    for part, model in models.items():
        shutil.rmtree(out / part)
        model.save_pretrained(out / part, max_shard_size="4GB")
    return out


def measure(name: str, args: Sequence[str]) -> dict[str, Any]:
    """Run one command of the product in this process; its exit code, seconds and peak GPU memory in GiB."""
    import torch

    from cogcache.cli import run

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    code = run(list(args))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    result = {"what": name, "exit_code": code, "seconds": round(time.monotonic() - started, 2)}
    return result | {"peak_gib": round(peak, 2)}


def main(
    family: Annotated[str, typer.Argument(help="2b, 5b, 5b-i2v, 1.5-5b or 1.5-5b-i2v.")],
    work: Annotated[Path, typer.Argument(help="Folder for model, shards and runs.")],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH.")] = "480x720",
    frames: Annotated[int, typer.Option(help="Frames a clip.")] = 49,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 6,
) -> None:
    """Encode the eight demo clips, train and generate at real size; print JSON lines."""
    import torch

    model = build_model(family, work / "model")
    shards, run = work / "shards", work / "run"
    encode = ["encode", "--data-root", str(CLIPS), "--model", str(model), "--fps", "source"]
    encode += ["--frames", str(frames), "--size", size, "--image-draws", "2"]
    train = ["train", "--shards", str(shards), "--output", str(run), "--steps", str(steps)]
    rows = [
        {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        measure("encode", [*encode, "--shards", str(shards), "--tiling", "off"]),
        measure("encode, tiled", [*encode, "--shards", str(work / "tiled"), "--tiling", "on"]),
        measure("train", [*train, "--checkpoint-every", "0"]),
    ]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(line["seconds"] for line in lines[1:] if "loss" in line)
    rows.append({"what": "train, median step", "seconds": round(seconds[len(seconds) // 2], 3)})
    for row in rows:
        typer.echo(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
